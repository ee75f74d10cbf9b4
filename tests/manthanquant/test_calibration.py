from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from manthanquant import calibration, formats
from manthanquant.calibration import Calibration, CalibrationError
from manthanquant.formats import SIDES
from manthanquant.transform import LayerTransform, dense_transform, gain_transform, hadamard_transform

SIZE, HEADS = 64, 2
SETTINGS = {"text": "a text", "kind": "gain", "recent_tokens": 128, "sink_tokens": 4}


def _made(fmt: formats.Format, kind: str) -> Calibration:
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for index in (0, 3):
        mean = torch.randn(HEADS, SIZE, generator=generator)
        if kind == "gain":
            order = torch.stack([torch.randperm(SIZE, generator=generator) for _ in range(HEADS)])
            key = gain_transform(fmt, "key", order, torch.rand(HEADS, SIZE, generator=generator) + 0.1, mean)
            value = hadamard_transform(fmt, "value", SIZE)
        else:
            key, value = (
                dense_transform(fmt, side, torch.randn(HEADS, SIZE, SIZE, generator=generator), m)
                for side, m in zip(SIDES, (mean, None))
            )
        layers[index] = LayerTransform(key, value)
    return Calibration(fmt.name, kind, layers, "0" * 64, {"seconds": "1.5"})


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "c" / "k42v3.safetensors"
    _made(formats.K42V3, "gain").save(path)
    return path


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    return tmp_path


@pytest.mark.parametrize("kind", ["gain", "dense"])
@pytest.mark.parametrize("fmt", formats.PAGED_FORMATS.values(), ids=lambda fmt: fmt.name)
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path, fmt, kind):
    made = _made(fmt, kind)
    made.save(tmp_path / "c")
    loaded = calibration.load(tmp_path / "c")
    assert (loaded.format, loaded.kind, loaded.key, loaded.notes) == (fmt.name, kind, made.key, made.notes)
    assert sorted(loaded.layers) == [0, 3]
    for index, layer in made.layers.items():
        for side in SIDES:
            ours, theirs = getattr(layer, side), getattr(loaded.layer(index), side)
            assert ours.kind == theirs.kind
            for name in ("forward", "inverse", "mean", "order", "gain"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert a is b is None or torch.equal(a, b), name


def test_a_layer_that_is_not_there_is_named(saved):
    with pytest.raises(CalibrationError, match="layer 7 is not in the calibration"):
        calibration.load(saved).layer(7)


def test_the_checksum_is_in_sha256sum_format_and_nothing_else_is_left(saved):
    digest = hashlib.sha256(saved.read_bytes()).hexdigest()
    assert (saved.parent / "k42v3.safetensors.sha256").read_text() == f"{digest}  k42v3.safetensors\n"
    assert len(list(saved.parent.iterdir())) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no checksum", "empty checksum", "no file"])
def test_a_damaged_file_is_one_clear_line(saved, damage):
    data, checksum = bytearray(saved.read_bytes()), calibration.checksum_path(saved)
    if damage == "flip":
        data[len(data) // 2] ^= 1
        saved.write_bytes(data)
    elif damage in ("truncate", "empty"):
        saved.write_bytes(data[: len(data) // 2 if damage == "truncate" else 0])
    elif damage == "no checksum":
        checksum.unlink()
    elif damage == "empty checksum":
        checksum.write_text("")
    else:
        saved.unlink()
    with pytest.raises(CalibrationError) as caught:
        calibration.load(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.clear(),
        lambda header: header.update(schema=99),
        lambda header: header.update(format="k9v9"),
        lambda header: header["kinds"]["0"].update(key="cubic"),
        lambda header: header["kinds"]["0"].update(key="dense"),
    ],
    ids=["foreign", "schema", "format", "kind", "missing tensors"],
)
def test_another_programs_file_is_refused(saved, change):
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["manthanquant"])
    change(ours)
    header["__metadata__"]["manthanquant"] = json.dumps(ours)
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + data[8 + length :]
    saved.write_bytes(changed)
    calibration.checksum_path(saved).write_text(hashlib.sha256(changed).hexdigest())
    with pytest.raises(CalibrationError, match="not a calibration"):
        calibration.load(saved)


def test_a_file_without_a_header_is_refused(tmp_path):
    path = tmp_path / "c"
    path.write_bytes(b"\xff" * 40)
    calibration.checksum_path(path).write_text(hashlib.sha256(b"\xff" * 40).hexdigest())
    with pytest.raises(CalibrationError, match="not a calibration"):
        calibration.load(path)


def test_a_file_made_for_other_settings_is_refused(saved):
    with pytest.raises(CalibrationError, match="another model or other settings"):
        calibration.load(saved, "1" * 64)


def test_a_new_file_replaces_the_old_one(saved):
    replace(_made(formats.K42V3, "gain"), key="2" * 64).save(saved)
    assert calibration.load(saved).key == "2" * 64


def test_the_key_depends_on_every_setting(model_dir):
    def key(fmt=formats.K42V3, positions=8192, **changed):
        return calibration.cache_key(model_dir, fmt, positions, **{**SETTINGS, **changed})

    base = key()
    others = [
        key(formats.K3V3),
        key(positions=4096),
        key(text="b"),
        key(kind="dense"),
        key(recent_tokens=64),
        key(sink_tokens=0),
    ]
    assert key() == base and len({base, *others}) == 7


def test_the_key_depends_on_config_and_weights(model_dir):
    keys = {calibration.model_identity(model_dir)}
    (model_dir / "config.json").write_text('{"rope_theta": 1}')
    keys.add(calibration.model_identity(model_dir))
    weights = bytearray((model_dir / "model.safetensors").read_bytes())
    weights[0] ^= 1
    (model_dir / "model.safetensors").write_bytes(weights)
    keys.add(calibration.model_identity(model_dir))
    (model_dir / "model.safetensors").write_bytes(weights + b"\0")
    keys.add(calibration.model_identity(model_dir))
    (model_dir / "README.md").write_text("not a weight")
    assert len(keys) == 4 and calibration.model_identity(model_dir) in keys


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_model_without_files_has_no_key(model_dir, missing):
    (model_dir / missing).unlink()
    with pytest.raises(CalibrationError, match=r"config.json.*downloaded model|holds no weight file"):
        calibration.model_identity(model_dir)


def test_the_path_tells_formats_and_keys_apart(tmp_path):
    paths = {calibration.cache_path(tmp_path, f, k * 64) for f in (formats.K3V3, formats.K42V3) for k in "01"}
    assert len(paths) == 4


def test_loading_needs_no_transformers():
    code = "import sys, manthanquant.calibration; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
