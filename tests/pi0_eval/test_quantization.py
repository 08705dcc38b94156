from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0.quantization import QuantizationConfig
from pi0_eval.quantization.command import choose_frames, main
from pi0_eval.quantization.measure import ActionError
from pi0_eval.quantization.report import search

CHECKPOINT, DATA = "tests/doctor/velocities", "bundled://metaworld_v30"
FEW = ["--data", DATA, "--episodes", "3", "--num-steps", "1", "--frames", "2", "--repeats", "1"]


class Toy:
    """Errors of layers that add up, with one whose error another one takes back."""

    def __init__(self, errors: dict[str, float]):
        self.errors, self.kept, self.calls = errors, list(errors), 0

    def keep_wide(self, names: Any) -> None:
        self.kept = list(names)

    def error(self) -> ActionError:
        self.calls += 1
        return ActionError(max(0.0, sum(e for n, e in self.errors.items() if n not in self.kept)), 0.0, [], 0.0)


def searched(errors: dict[str, float], max_error: float) -> tuple[list[str], Toy]:
    case: Any = Toy(errors)
    order = sorted(errors, key=lambda name: errors[name], reverse=True)
    return search(case, order, max_error, {}), case


def test_search_keeps_the_fewest_that_do():
    errors = {f"layer {i}": 2.0**-i for i in range(20)}
    for max_error, count in ((3.0, 0), (1.0, 1), (0.26, 3), (1e-5, 18), (0.0, 20)):
        kept, case = searched(errors, max_error)
        case.keep_wide(kept)
        assert kept == list(errors)[:count]
        assert case.error().mean <= max_error
    assert searched(errors, 3.0)[1].calls <= 6  # a bisection, where nothing has to be given back


def test_search_quantizes_again_what_did_not_help():
    """The two worst are both wide for the error of the second, of which the first is no part."""
    kept, case = searched({"loud": 0.5, "worse": 0.4, "odd": -0.45, "rest": 0.01}, 0.06)
    case.keep_wide(kept)
    assert case.error().mean <= 0.06 and kept == ["loud"]


@dataclasses.dataclass
class Recordings:
    """Episodes of 10 frames."""

    episodes: list[Any]

    @property
    def starts(self) -> np.ndarray:
        return np.arange(len(self.episodes) + 1) * 10


def test_ranges_are_calibrated_on_other_episodes():
    recordings: Any = Recordings([dataclasses.make_dataclass("Episode", ["index"])(i) for i in (4, 7, 9)])
    chosen, others = choose_frames(recordings, [7], 5, 4)
    assert chosen == [10, 12, 14, 16, 19] and others == [0, 6, 22, 29]
    assert choose_frames(recordings, None, 2, 2) == ([0, 29], [0, 29])  # where there are no others
    with pytest.raises(ValueError, match=r"has no episodes \[5\]"):
        choose_frames(recordings, [5, 7], 5, 4)


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A policy trained on the bundled recordings: the layers named worst are those that, kept wide, help."""
    config = QuantizationConfig({"action_*": "int4", "vision.head": "w8a8"})
    config.save(tmp_path / "given.json")
    out = tmp_path / "out"
    main([CHECKPOINT, *FEW, "--quantize", str(tmp_path / "given.json"), "--max-error", "0.2", "--out", str(out)])
    report = json.loads((out / "report.json").read_text())
    errors = [layer["error"]["mean"] for layer in report["layers"]]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert {layer["format"] for layer in report["layers"]} == {"int4", "w8a8"}
    names = {layer["name"] for layer in report["layers"]}
    assert "vision.head" in names and not any(name.startswith("paligemma") for name in names)
    quantized, worst, found = (report["variants"][name] for name in ("quantized", "worst wide", "searched"))
    assert quantized["error"]["mean"] > 0.002 >= found["error"]["mean"]
    assert (
        worst["error"]["mean"] < quantized["error"]["mean"]
        and worst["wide"] == [r["name"] for r in report["layers"]][:5]
    )
    assert quantized["bytes"] < found["bytes"] < report["wide_bytes"]
    assert quantized["stages"]["vision layer 1"] == 0 < quantized["stages"]["image tokens"] < 0.1
    assert quantized["loss"] != report["wide_loss"]
    assert (out / "layers.png").stat().st_size > 10_000
    chosen = QuantizationConfig.load(out / "quantization.json")
    assert set(found["wide"]) == {name for name, format in chosen.layers.items() if format == "wide"}
    assert chosen.input_ranges.keys() >= {"vision.head"}
    text = capsys.readouterr().out
    assert "layers that hurt most" in text and f"{len(found['wide'])} layers stay wide" in text
    with pytest.raises(SystemExit):
        main([CHECKPOINT, *FEW, "--out", str(out)])
    assert "exists already" in capsys.readouterr().err


def test_what_it_wrote_is_what_a_policy_runs(tmp_path: Path):
    import pi0_torch
    from pi0_torch.quantization import ChannelWeight, sampler_layers

    QuantizationConfig({"*": "int8", "action_out_proj": "wide"}).save(tmp_path / "q.json")
    options: dict[str, Any] = {"num_steps": 1, "use_sampler": True, "quantization": tmp_path / "q.json"}
    policy = pi0_torch.Policy.from_pretrained(CHECKPOINT, **options)
    kinds = {name: type(layer[0]) for name, layer in sampler_layers(policy.sampler.weights).items()}
    assert kinds.pop("action_out_proj") is not ChannelWeight and set(kinds.values()) == {ChannelWeight}
    with pytest.raises(ValueError, match="quantization are options of the sampler"):
        pi0_torch.Policy.from_pretrained(CHECKPOINT, quantization="int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int5"], "must be one of wide"),
        (["--quantize", "wide"], "quantizes no layer"),
        (["--quantize", "int8", "--group-size", "64"], "--group-size is of int4"),
        (["--frames", "0"], "--frames is 0"),
        (["--max-error", "-1"], "--max-error is -1.0"),
        (["--episodes", "99"], "has no episodes [99]"),
        (["--quantize", "w8a8_float8"], "multiplies in float8, which the CPU does not"),
    ],
)
def test_errors(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([CHECKPOINT, *FEW, *arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
