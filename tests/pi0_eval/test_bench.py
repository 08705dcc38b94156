from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from pi0.plots import plot_latency
from pi0.variants import get_variant
from pi0_eval.bench import Case, Report, Result, benchmark, cases_of, main, roofline_ms
from pi0_eval.roofline import costs

CASE = Case("bench", "jax", "sampler", "", None, "float32", cameras=3, batch=1, steps=10, repeats=2)
RESULT = Result(
    CASE, "cpu", 9e3, 580.0, 600.0, 650.0, {"vision": 100.0, "prefix": 200.0, "step": 30.0}, 1e3, 3e11, 1e10
)


def test_costs_of_one_product_each():
    """Counted by hand for one vision layer, one step and two prefix layers, of which the last gives keys and values."""
    config = get_variant("tiny")  # 6 image tokens, 8 of text, 5 actions and a state
    one = dataclasses.replace(config, vision=dataclasses.replace(config.vision, depth=1))
    deep = lambda gemma, depth: dataclasses.replace(gemma, depth=depth)  # noqa: E731
    prefix, suffix = 6 + 8, 1 + 5
    vision = 3 * 14 * 14 * 24 + (4 * 24 * 24 + 2 * 24 * 40) + 24 * 32
    assert costs(one, 1, 1)["vision"] == (2 * 6 * vision + 4 * 6 * 6 * 24, 4 * vision)
    two = dataclasses.replace(config, paligemma=deep(config.paligemma, 2), action_expert=deep(config.action_expert, 2))
    layer, last = 32 * (2 * 64 + 2 * 32) + 3 * 32 * 56, 32 * 64
    assert costs(two, 1, 1)["prefix"] == (2 * prefix * (layer + last) + 4 * prefix * prefix * 64, 4 * (layer + last))
    expert = 2 * (20 * (2 * 64 + 2 * 32) + 3 * 20 * 36) + 2 * 7 * 20
    attention, cache = 2 * 4 * suffix * (prefix + suffix) * 64, 2 * 2 * (prefix + suffix) * 32
    assert costs(two, 1, 1)["step"] == (2 * suffix * expert + attention, 4 * (expert + cache))
    assert costs(two, 1, 3)["step"][0] == 3 * costs(two, 1, 1)["step"][0]


def test_costs_of_a_token():
    """All layers, the output layer, and the cache: each read once."""
    config = get_variant("tiny_pi0_fast", dtype="float32")
    gemma, seen = config.paligemma, config.prefix_len
    heads = gemma.num_heads * gemma.head_dim
    kept = 2 * gemma.num_kv_heads * gemma.head_dim
    layer = gemma.width * (2 * heads + kept) + 3 * gemma.width * gemma.mlp_dim
    token = gemma.depth * layer + config.vocab_size * gemma.width
    attention = 4 * gemma.depth * (seen + 1) * heads
    expected = 2 * token + attention, 4 * (token + gemma.depth * (seen + 1) * kept)
    assert costs(config, len(config.image_keys), 1)["step"] == expected


def test_roofline_is_arithmetic_or_memory():
    """The 58 M model takes 0.1 TFLOP a call, and reads 10 times 35 MB of the action expert."""
    assert roofline_ms(CASE, flops=1e12, bandwidth=1e15) == pytest.approx(100, rel=0.1)
    assert roofline_ms(CASE, flops=1e18, bandwidth=1e9) == pytest.approx(550, rel=0.1)


def test_gradients_cost_three_times_the_loss():
    """Two products for each of the loss, and the action expert reads its suffix once."""
    loss, gradients = dataclasses.replace(CASE, steps=1), dataclasses.replace(CASE, path="gradients")
    assert roofline_ms(gradients, 1e12, 1e15) == pytest.approx(3 * roofline_ms(loss, 1e12, 1e15))


def test_report(tmp_path: Path):
    slower = dataclasses.replace(RESULT, case=dataclasses.replace(CASE, path="model"), stages_ms={}, flops=1e11)
    report = Report([RESULT, slower])
    assert report.ceilings("float32") == (3e11, 1e10)
    assert "jax sampler" in report.table() and "300 GFLOP/s, 10 GB/s" in report.table()
    row = json.loads(report.to_json())[0]
    assert row["ratio"] == pytest.approx(600 / row["roofline_ms"])
    plot_latency({"sampler": (600.0, 330.0), "model": (900.0, 330.0)}, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cameras", "4"], "bench has 3"),
        (["--batch", "0"], "at least 1"),
        (["--model", "pi9"], "unknown model variant"),
        (["--model", "tiny_pi0_fast", "--steps", "1"], "the first is the prefix's"),
        (["--framework", "jax", "--backend", "sdpa"], "--backend and --compile are for PyTorch's sampler"),
        (["--framework", "jax", "--quantize", "int8"], "--quantize is for PyTorch's sampler"),
        (["--path", "model", "--compile"], "--backend and --compile are for PyTorch's sampler"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "tiny_pi0_fast"])
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("path", ["model", "sampler", "gradients"])
def test_a_run(model: str, framework: str, path: str):
    backend = "sdpa" if (framework, path) == ("torch", "sampler") and model == "tiny" else ""
    case = Case(model, framework, path, backend, None, "bfloat16", cameras=1, batch=2, steps=2, repeats=3)
    (result,) = benchmark([case]).results
    assert result.best_ms <= result.median_ms <= result.p99_ms
    assert result.peak_mib > 100 and result.flops > 1e9 and result.bandwidth > 1e8
    decodes = model == "tiny_pi0_fast" and path != "gradients"
    assert bool(result.stages_ms) == (path == "sampler" or decodes)
    assert (result.tokens_per_second is None) == (not decodes)


def test_options_without_effect_make_no_cases():
    """A backend makes a case of PyTorch's sampler alone."""
    parsed = argparse.Namespace(
        model=["tiny"],
        framework=["jax", "torch"],
        path=["model", "sampler"],
        backend=["sdpa", "eager"],
        compile=None,
        quantize=["none", "int8"],
        dtype=["float32"],
        cameras=[1],
        batch=[1],
        steps=2,
        repeats=1,
    )
    names = [case.name for case in cases_of(parsed)]
    own = [f"torch sampler {backend}{format}" for backend in ("sdpa", "eager") for format in ("", " int8")]
    assert names == ["jax model", "jax sampler", "torch model", *own]
