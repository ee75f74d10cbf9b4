from __future__ import annotations

import argparse
import json

import pytest
import torch
from support.random_models import save_model

pytest.importorskip("transformers")
from manthanquant import calibrate, formats, quality
from manthanquant.hf import Model
from manthanquant.simulate import Cache, fp8_cache, seed_cache

TEXT = "In the beginning there was a list: 3 apples, 14 pears, 159 plums; then someone counted them again. " * 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def model(model_dir):
    return Model(model_dir)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    return quality.run(parser.parse_args([str(a) for a in arguments]))


def test_the_exact_cache_costs_nothing(model):
    exact = Cache("exact", lambda size: 4.0 * size, lambda call: (call.key, call.value))
    perplexity, (score,) = quality.score(model, model.tokens(TEXT)[:400], [exact], 150)
    assert score.kld == pytest.approx(0, abs=1e-6) and score.top1 == 1
    assert score.perplexity == pytest.approx(perplexity, rel=1e-5)


def test_scores_are_those_of_the_whole_logits(model):
    """Scoring by parts of the vocabulary's logits gives what the definitions give on all of them at once."""
    tokens, cache, scored = model.tokens(TEXT)[:400], seed_cache(), 150
    perplexity, (score,) = quality.score(model, tokens, [cache], scored)
    exact = model.log_probabilities(model.hidden(tokens))[-scored:].double()
    with model.replaced(cache.attention):
        ours = model.log_probabilities(model.hidden(tokens))[-scored:].double()
    kld = (exact.exp() * (exact - ours)).sum(-1)
    assert score.kld == pytest.approx(kld.mean().item(), rel=1e-3)
    assert score.kld_p99 == pytest.approx(kld.quantile(0.99).item(), rel=1e-3)
    assert score.top1 == pytest.approx((exact.argmax(-1) == ours.argmax(-1)).double().mean().item())
    picked = exact[:-1].gather(1, tokens[-scored + 1 :, None])
    assert perplexity == pytest.approx((-picked.mean()).exp().item(), rel=1e-5)


def test_more_bits_and_exact_tiers_cost_less(model):
    tokens = model.tokens(TEXT)[:700]
    names = ["k4v4:dense", "k3v3:dense", "k3v3:hadamard"]  # on random weights gains find nothing
    tiers = quality.our_caches(model, names, TEXT, 1024, 4, 128)
    (bare,) = quality.our_caches(model, ["k3v3:dense"], TEXT, 1024, 0, 0)
    _, scores = quality.score(model, tokens, [*tiers, bare, fp8_cache()], 300)
    k4v4, k3v3, hadamard, without_tiers, _ = (s.kld for s in scores)
    assert 0 < k4v4 < k3v3 < hadamard
    assert k3v3 < without_tiers
    assert [s.cache for s in scores[:3]] == ["k4v4, dense", "k3v3, dense", "k3v3, hadamard"]


def test_a_calibration_file_is_scored_as_it_serves(model_dir, model, text_file, tmp_path, capsys):
    made = calibrate.calibrate(model_dir, formats.K42V3, 1024, text=TEXT)
    made.save(tmp_path / "c")
    arguments = [model_dir, "--text", text_file, "--tokens", 600, "--scored", 200, "--calibration-text", text_file]
    arguments += ["--max-positions", 1024, "--caches", "mq3", "--json", tmp_path / "out.json"]
    assert _run(*arguments, "--calibration", tmp_path / "c") == 0
    out = capsys.readouterr().out
    assert "| k42v3, dense |" in out and "| fp8 (e4m3) |" in out and "| turboquant_3bit_nc |" in out
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    by_name = {score["cache"]: score for score in run["scores"]}
    assert run["tokens"] == 600 and run["scored"] == 200
    assert by_name["k42v3, dense (c)"]["kld"] == by_name["k42v3, dense"]["kld"]
    assert 0 < by_name["k42v3, dense"]["kld"] < by_name["seed3"]["kld"]
    assert by_name["k42v3, dense"]["pair_bytes"] == 52


def test_the_table_names_what_was_measured():
    scores = [quality.Score("k42v3, dense", 100, 0.00479, 0.0002, 0.0401, 0.961, 12.1, 0.0123)]
    table = quality.markdown(quality.Run("a.txt", "ab" * 32, 2048, 1024, 12.0, scores))
    assert "a.txt: 2,048 tokens, the last 1,024 scored; exact perplexity 12.00 (text sha256 abababababab)" in table
    assert "| k42v3, dense | 100 | 0.0048 ± 0.0002 | 0.040 | 96.1% | +1.2% |" in table


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "5000"], "has 1188 tokens, --tokens asks for 5000"),
        (["--tokens", "8"], "--tokens: 8 is too few"),
        (["--caches", "k9v9"], "format 'k9v9' is unknown"),
        (["--caches", "seed3"], "format 'seed3' has no page"),
        (["--caches", "mq3:cubic"], "transform 'cubic' in 'mq3:cubic' is unknown: use one of hadamard, gain, dense"),
        (["--max-positions", "64"], "needs 512 tokens or more"),
        (["--calibration", "absent"], "absent: cannot be read"),
        (["--text", "absent.txt"], "No such file"),
    ],
)
def test_bad_input_is_one_line(model_dir, text_file, capsys, arguments, message):
    defaults = ["--text", text_file, "--tokens", 600, "--scored", 64, "--calibration-text", text_file]
    assert _run(model_dir, *defaults, "--no-peers", *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("manthanquant quality: ")]
    assert len(error) == 1 and message in error[0]


def test_a_missing_model_is_one_line(tmp_path, capsys):
    assert _run(tmp_path / "absent") == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_the_default_text_is_prose_and_long_enough():
    text = quality.standard_library_text()
    assert len(text.split()) > 8_000
    assert not any(line in text for line in calibrate.built_in_text().splitlines() if len(line) > 60)


def test_the_head_is_checked(model_dir):
    model = Model(model_dir)
    head = model.module.lm_head
    model.module.forward = lambda ids, use_cache: type("Out", (), {"logits": head(torch.zeros(1, 8, 64)) + 1.0})
    with pytest.raises(ValueError, match="changes its logits"):
        model.check_head()
