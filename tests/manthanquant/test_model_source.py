from pathlib import Path
from typing import Any

import pytest

from manthanquant import model_source
from manthanquant.model_source import ModelError, Source


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("hf://org/name", Source("hf", "org/name")),
        ("hf://org/name@v1", Source("hf", "org/name", "v1")),
        ("org/name", Source("hf", "org/name")),
        ("pvc://claim/some/model", Source("pvc", "claim/some/model")),
        ("file:///data/model", Source("file", "/data/model")),
        ("./there", Source("path", "./there")),
        ("/data/model", Source("path", "/data/model")),
    ],
)
def test_parse(uri: str, source: Source) -> None:
    assert model_source.parse(uri) == source


def test_an_existing_directory_is_a_path_even_where_it_looks_like_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_source.parse("org/name") == Source("path", "org/name")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("hf://name", "InvalidUri"),
        ("hf://a/b/c", "InvalidUri"),
        ("pvc://", "InvalidUri"),
        ("pvc://claim/../up", "InvalidUri"),
        ("file://relative", "InvalidUri"),
        ("s3://bucket/model", "SchemeUnsupported"),
    ],
)
def test_a_bad_uri_is_refused_with_a_reason_and_a_field(uri: str, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_source.parse(uri)
    assert caught.value.reason == reason
    assert caught.value.field == "spec.model.uri"
    assert uri in str(caught.value)


def make_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x" * 10)
    (path / "tokenizer.json").write_bytes(b"x" * 5)
    return path


def test_a_claim_is_read_below_its_mount(tmp_path: Path) -> None:
    made = make_model(tmp_path / "a" / "b")
    assert model_source.resolve("pvc://claim/a/b", tmp_path) == made
    assert model_source.size_bytes(made) == 10


def test_a_node_path_is_the_mount_itself_where_the_pod_does_not_have_it(tmp_path: Path) -> None:
    made = make_model(tmp_path / "mount")
    assert model_source.resolve("file:///no/such/place", made) == made
    assert model_source.resolve(f"file://{made}", "/nowhere") == made


def test_what_is_not_there_is_said_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no directory at .*/a: check the path") as caught:
        model_source.resolve("pvc://claim/a", tmp_path)
    assert caught.value.reason == "ModelNotFound"


def test_a_directory_that_is_no_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "README").touch()
    with pytest.raises(ModelError, match=r"holds README but no config.json") as caught:
        model_source.resolve(str(tmp_path))
    assert caught.value.reason == "ModelIncomplete"


class Answer:
    """A hub's answer to a request that failed."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.status_code = 404
        self.request: Any = None


@pytest.mark.parametrize(
    ("error", "reason", "field"),
    [
        ("RepositoryNotFoundError", "ModelNotFound", "spec.model.uri"),
        ("RevisionNotFoundError", "RevisionNotFound", "spec.model.uri"),
        ("GatedRepoError", "ModelGated", "spec.model.tokenSecretRef"),
        ("LocalEntryNotFoundError", "HubUnreachable", "spec.model.uri"),
    ],
)
def test_the_hubs_errors(error: str, reason: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(pytest.importorskip("huggingface_hub.errors"), error)
    failure = kind("no") if error == "LocalEntryNotFoundError" else kind("no", response=Answer())

    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError) as caught:
        model_source.resolve("hf://org/name@v1")
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert "hf://org/name@v1" in str(caught.value)


def test_a_full_disk_is_a_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="No space left") as caught:
        model_source.resolve("hf://org/name")
    assert caught.value.reason == "DownloadFailed"


def test_a_model_of_the_hub_is_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    made = make_model(tmp_path / "snapshot")
    asked = []

    def download(name: str, revision: str | None, **kwargs: object) -> str:
        asked.append((name, revision))
        return str(made)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert model_source.resolve("hf://org/name@v1") == made
    assert asked == [("org/name", "v1")]
