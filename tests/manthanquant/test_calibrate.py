from __future__ import annotations

import pytest
import torch
from support.random_models import save_model

pytest.importorskip("transformers")
from manthanquant import calibrate, calibration, formats
from manthanquant.calibrate import LayerStatistics, transforms
from manthanquant.calibration import CalibrationError
from manthanquant.hf import AttentionCall, Model, exact_attention, rotary_candidates
from manthanquant.transform import hadamard_transform

SIZE = 64
LINE = "The quick brown fox jumps over the lazy dog; 1 + 1 = 2, and so on, until the page is full. "
TEXT = LINE * 12


def _moment(generator: torch.Generator, heads: int = 2) -> torch.Tensor:
    """A positive moment of trace 1 with a wide spread of channels, which are correlated."""
    root = torch.randn(heads, SIZE, SIZE, generator=generator, dtype=torch.float64)
    root = root * torch.logspace(-1.5, 0.5, SIZE, dtype=torch.float64)[torch.randperm(SIZE, generator=generator), None]
    moment = root @ root.transpose(1, 2)
    return moment / moment.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


@pytest.fixture
def statistics():
    g = torch.Generator().manual_seed(7)
    mean = torch.randn(2, SIZE, generator=g, dtype=torch.float64)
    return LayerStatistics(mean, *(_moment(g) for _ in range(4)))


def _coded_moments(side, source, metric):
    """Of what is coded, and of the queries it meets: T A T^T and T^-T B T^-1."""
    forward, inverse = side.forward.double(), side.inverse.double()
    return forward @ source @ forward.transpose(1, 2), inverse.transpose(1, 2) @ metric @ inverse


def _predicted_error(side, source, metric):
    """Equal code width: each coded channel gets an error of tr(T A T^T) / D, and errors are weighed by T^-T B T^-1."""
    coded, weighed = _coded_moments(side, source, metric)
    trace = lambda m: m.diagonal(dim1=1, dim2=2).sum(1)
    return trace(coded) * trace(weighed)


def test_dense_beats_gain_beats_hadamard_and_reaches_the_optimum(statistics):
    source, metric = statistics.key, statistics.query
    plain = _predicted_error(hadamard_transform(formats.K3V3, "key", SIZE), source, metric)
    gain = _predicted_error(transforms(statistics, formats.K3V3, "gain").key, source, metric)
    dense = _predicted_error(transforms(statistics, formats.K3V3, "dense").key, source, metric)
    assert bool((dense < gain).all()) and bool((gain < plain).all())
    # Over all T, tr(T A T^T) tr(T^-T B T^-1) is least at the squared sum of roots of the eigenvalues of A B.
    optimum = torch.linalg.eigvals(source @ metric).real.clamp_min(0).sqrt().sum(1).square()
    assert torch.allclose(dense, optimum, rtol=0.05)
    spreads = (source.diagonal(dim1=1, dim2=2) * metric.diagonal(dim1=1, dim2=2)).sqrt().sum(1).square()
    assert torch.allclose(gain, spreads, rtol=0.05)


@pytest.mark.parametrize("kind", ["gain", "dense"])
def test_the_wide_class_holds_the_important_channels_at_unit_variance(statistics, kind):
    side = transforms(statistics, formats.K42V3, kind).key
    eye = torch.eye(SIZE, dtype=torch.float64) / SIZE  # of trace 1, as the moments
    coded, weighed = _coded_moments(side, statistics.key + calibrate._SHRINK * eye, statistics.query)
    half = SIZE // 2
    for part in (slice(0, half), slice(half, SIZE)):
        variance = coded[:, part, part].diagonal(dim1=1, dim2=2).mean(1)
        assert torch.allclose(variance, torch.ones(2, dtype=torch.float64), rtol=1e-2)  # gains are bf16
    importance = weighed.diagonal(dim1=1, dim2=2)
    assert bool((importance[:, :half].sum(1) > 3 * importance[:, half:].sum(1)).all())


@pytest.mark.parametrize("kind", calibrate.KINDS)
def test_both_sides_are_calibrated_and_only_keys_lose_their_mean(statistics, kind):
    layer = transforms(statistics, formats.K42V3, kind)
    assert (layer.key.kind, layer.value.kind) == (kind, kind)
    assert torch.equal(layer.key.mean, statistics.mean.float()) and layer.value.mean is None
    plain = _predicted_error(hadamard_transform(formats.K42V3, "value", SIZE), statistics.value, statistics.output)
    assert bool((_predicted_error(layer.value, statistics.value, statistics.output) < plain).all())


def test_an_unknown_kind_is_named(statistics):
    with pytest.raises(ValueError, match=r"'cubic' .* gain, dense"):
        transforms(statistics, formats.K3V3, "cubic")


def test_moments_of_rank_one_still_make_an_invertible_transform(statistics):
    v = torch.zeros(2, SIZE, dtype=torch.float64)
    v[:, 3] = 1
    flat = LayerStatistics(statistics.mean, *(v[:, :, None] * v[:, None] for _ in range(4)))
    for kind in calibrate.KINDS:
        side = transforms(flat, formats.K42V3, kind).key
        assert torch.allclose(side.forward @ side.inverse, torch.eye(SIZE), atol=1e-3)


def test_pair_weights_are_the_formulas_sums():
    """Against the sums written out pair by pair, with two query heads a KV head and a sliding window."""
    g = torch.Generator().manual_seed(11)
    length, recent, sinks, window, scale = 40, 8, 2, 30, 0.3
    query, key, value = (torch.randn(n, length, 6, generator=g) for n in (4, 2, 2))
    weight = torch.randn(10, 24, generator=g)
    still = rotary_candidates(torch.zeros(3), 6)[0]
    sums = calibrate._Sums(
        call := AttentionCall(0, query, key, value, scale, window, None, weight), still, 512, recent, sinks
    )
    output = sums.add(call)
    assert torch.allclose(output, exact_attention(call), atol=1e-5)

    mean = key[:, sinks:].mean(1)
    projected = [weight[:, 6 * h : 6 * h + 6] for h in range(4)]
    size = torch.stack([(output[h] @ projected[h].T).square().sum(1) for h in range(4)]).sum(0)
    key_weight, value_weight = torch.zeros(2, length), torch.zeros(2, length)
    query_weight = torch.zeros(4, length)
    for h in range(4):
        kv = h // 2
        for i in range(length):
            seen = range(max(0, i - window + 1), i + 1)
            p = (query[h, i] @ key[kv, seen.start : i + 1].T * scale).softmax(0)
            for j in seen:
                if i - j < recent or j < sinks:
                    continue
                change = (projected[h] @ (value[kv, j] - output[h, i])).square().sum()
                w = p[j - seen.start] ** 2 * change / size[i]
                key_weight[kv, j] += w * query[h, i].square().sum()
                query_weight[h, i] += w * (key[kv, j] - mean[kv]).square().sum()
                value_weight[kv, j] += p[j - seen.start] ** 2 / size[i]
    expected = torch.einsum("hj,hjd,hje->hde", key_weight, key, key)
    assert torch.allclose(sums.totals["weighted_key2"].float(), expected, rtol=1e-3)
    assert torch.allclose(sums.totals["weighted_value0"].float(), value_weight.sum(1), rtol=1e-3)
    expected = torch.einsum("hgi,hgid,hgie->hde", query_weight.view(2, 2, -1), *[query.view(2, 2, length, 6)] * 2)
    assert torch.allclose(sums.totals["weighted_query2"].float(), expected, rtol=1e-3)


def _turning_call(length=300, size=8):
    """Keys and queries that are one vector each, turned by their positions; and the unturned vectors."""
    g = torch.Generator().manual_seed(13)
    rotary = rotary_candidates(torch.tensor([1.0, 0.3, 0.05, 0.001]), size)[0]
    key, query = torch.randn(2, 1, 1, size, generator=g, dtype=torch.float64)
    turned = [rotary.turn(x.expand(1, length, size), torch.arange(length)).float() for x in (query, key)]
    value, weight = torch.randn(1, length, size, generator=g), torch.randn(size, size, generator=g)
    return AttentionCall(0, *turned, value, 0.1, None, None, weight), rotary, key[0, 0], query[0, 0]


def test_positions_of_the_text_are_turned_back_and_all_positions_averaged():
    """The text's own 300 positions leave no trace: the statistics are averages over 4,096 positions."""
    call, rotary, key, query = _turning_call()
    sums = calibrate._Sums(call, rotary, 4096, 16, 4)
    sums.add(call)
    found = sums.statistics()
    mean = rotary.average_vector(key, 4096)
    assert torch.allclose(found.mean[0], mean, atol=1e-5)
    about = rotary.average_moment(torch.outer(key, key), 4096) - torch.outer(mean, mean)
    assert torch.allclose(found.key[0], about / about.trace(), atol=1e-5)
    moment = rotary.average_moment(torch.outer(query, query), 4096)
    assert torch.allclose(found.query[0], moment / moment.trace(), atol=1e-5)


def test_the_mean_is_weighted_and_plain_where_no_pair_counts():
    """Over all weights, the weighted mean is the point about which keys spread least."""
    g = torch.Generator().manual_seed(17)
    query, key, value = (torch.randn(n, 200, 8, generator=g) for n in (4, 2, 2))
    call = AttentionCall(0, query, key, value, 0.5, None, None, torch.randn(10, 32, generator=g))
    still = rotary_candidates(torch.zeros(4), 8)[0]
    for sinks, weighted in ((4, True), (190, False)):  # the last 10 keys meet no query that is 16 tokens on
        sums = calibrate._Sums(call, still, 512, 16, sinks)
        sums.add(call)
        prefix = "weighted_key" if weighted else "key"
        expected = sums.totals[prefix + "1"] / sums.totals[prefix + "0"][:, None]
        found = sums.statistics()
        assert torch.allclose(found.mean, expected)
        if not weighted:
            plain = (key[:, sinks:] - key[:, sinks:].mean(1, keepdim=True)).double()
            moment = plain.transpose(1, 2) @ plain
            assert torch.allclose(found.key, moment / calibrate._trace(moment), atol=1e-5)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_a_text_and_the_same_text_behind_its_own_beginning_have_the_same_statistics(model_dir):
    model = Model(model_dir)
    near = calibrate.measure(model, TEXT, 4096)
    far = calibrate.measure(model, 8 * LINE + TEXT, 4096)
    for layer in near:
        distance = (near[layer].mean - far[layer].mean).norm() / near[layer].mean.norm()
        assert distance < 0.1, layer
        assert (near[layer].key - far[layer].key).norm() / near[layer].key.norm() < 0.1


def test_a_longer_span_averages_more_of_the_mean_away(model_dir):
    model = Model(model_dir)
    short, long = (calibrate.measure(model, TEXT, span)[0].mean.norm() for span in (600, 100_000))
    assert long < short


@pytest.mark.parametrize("fmt", formats.PAGED_FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_calibration_has_every_layer_and_its_own_key(model_dir, fmt):
    made = calibrate.calibrate(model_dir, fmt, 1024, text=TEXT)
    assert (made.format, made.kind) == (fmt.name, calibrate.DEFAULT_KINDS[fmt.name])
    assert sorted(made.layers) == [0, 1]
    assert made.layer(0).key.forward.shape == (2, SIZE, SIZE)
    expected = calibration.cache_key(model_dir, fmt, 1024, text=TEXT, kind=made.kind, recent_tokens=128, sink_tokens=4)
    assert made.key == expected


def test_calibrating_twice_gives_the_same_bytes(model_dir, tmp_path):
    for name in ("a", "b"):
        made = calibrate.calibrate(model_dir, formats.K42V3, 1024, text=TEXT)
        made.notes.clear()
        made.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("text, span", [("too short", 8192), (TEXT, 100)])
def test_too_little_text_or_length_is_refused(model_dir, text, span):
    with pytest.raises(CalibrationError, match=r"needs 512 tokens or more.*calibration off"):
        calibrate.calibrate(model_dir, formats.K42V3, span, text=text)


def test_a_model_that_cannot_be_loaded_is_a_calibration_error(tmp_path):
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        calibrate.calibrate(tmp_path, formats.K42V3, 8192)


def test_a_layer_without_an_output_projection_is_refused():
    x = torch.zeros(2, 600, 8)
    call = AttentionCall(3, x, x, x, 1.0, None, None, None)
    with pytest.raises(CalibrationError, match="layer 3: no output projection"):
        calibrate._Sums(call, rotary_candidates(torch.zeros(4), 8)[0], 600, 128, 4)


def test_keys_that_are_not_finite_are_refused(model_dir, monkeypatch):
    model = Model(model_dir)
    with torch.no_grad():
        model.module.model.layers[1].self_attn.v_proj.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="not finite"):
        calibrate.measure(model, TEXT, 1024)


def test_the_built_in_text_is_long_and_varied():
    text = calibrate.built_in_text()
    assert len(text.split()) > 3_000
    for sample in ("def ", "SELECT", "fn main", "ERROR", "SYNOPSIS", "User: ", "1. ", "- ", "| ", '{"', "?", "é", "は"):
        assert sample in text
