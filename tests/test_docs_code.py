"""The Python code of README and docs runs: the blocks of a page in order, in one namespace.

What a reader has and a test has not stands in `PAGES`: addresses of large checkpoints and of servers are replaced by
those of small ones, and names that a text introduces, such as `image`, are given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pi0_torch
from pi0.experiments import find_experiment
from pi0.quantization import QuantizationConfig
from pi0.run_config import RunConfig
from pi0_eval.export.exporting import Options, export
from tests.pi0_serve.serving import observation, serve, write_tiny
from tests.test_docs import PAGES as ALL_PAGES
from tests.test_docs import ROOT, blocks

Namespace = dict[str, Any]
KEY = "a-key-of-the-tests"
RUN = ROOT / "tests" / "openpi_runs"


@dataclasses.dataclass(frozen=True)
class Page:
    """How the code of a page is run.

    Attributes:
        texts: what is replaced in the code, and by what; `{port}` is that of a server that runs meanwhile.
        given: the names that the code uses and does not define.
        prepare: makes the files that it opens, in the working directory.
        check: is called with all names afterwards, and asserts what the page says of them.
        left_out: numbers of blocks that are not run, with the reason.
    """

    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    given: Namespace = dataclasses.field(default_factory=dict)
    prepare: Callable[[Path], Any] = lambda folder: None
    check: Callable[[Namespace], Any] = lambda names: None
    left_out: Mapping[int, str] = dataclasses.field(default_factory=dict)


def droid_run(folder: Path) -> None:
    """A run of openpi's config pi05_droid with a small model, and the tokenizer that stands in for PaliGemma's."""
    shutil.copytree(RUN / "pi05_droid" / "run" / "2", folder / "droid")
    shutil.copytree(RUN / "pi05_libero" / "run" / "2" / "params", folder / "droid" / "params")


def pair(folder: Path) -> None:
    write_tiny(folder / "exported" / "jax", "pi0_jax")
    write_tiny(folder / "exported" / "torch")


def exported(folder: Path) -> None:
    write_tiny(folder / "runs" / "demo" / "export", action_horizon=20)


def posttrained(folder: Path) -> None:
    """A π0.5 that writes subtasks."""
    config = write_tiny(folder / "runs" / "posttrain", kind="pi05", max_token_len=96) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"subtasks": True}))


def quantized(folder: Path) -> None:
    write_tiny(folder / "runs" / "metaworld_torch")
    QuantizationConfig({"*": "int8"}).save(folder / "runs" / "int8" / "quantization.json")


def to_onnx(folder: Path) -> None:
    """An export to ONNX, where the extra is installed."""
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    export(write_tiny(folder / "policy"), folder / "runs" / "onnx", Options("onnx", prompts=(24,)), most=1)


def with_shape(name: str, *shape: int | None) -> Callable[[Namespace], None]:
    """A check of the shape of `actions` in a result or an answer, or of the actions themselves; None: any size."""

    def check(names: Namespace) -> None:
        value = names[name]
        found = (value["actions"] if isinstance(value, dict) else value).shape
        assert len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True)), found

    return check


def trains(names: Namespace) -> None:
    """The experiment of the tutorial, as a file, is one that `pi0-train` takes."""
    config = names["get_config"]()
    assert config.steps == 20_000 and config.model.action_horizon == 30


def recipe(names: Namespace) -> None:
    """The fields are those of a run, and the policy has both a subtask and actions."""
    assert RunConfig.from_dict(names["config"].to_dict()).data.mixture
    assert names["result"]["actions"].shape[1:] == (4,) and isinstance(names["result"]["subtask"], str)


class Arm:
    """A robot of four dimensions."""

    def __init__(self) -> None:
        self.sent: list[np.ndarray] = []

    def send(self, action: np.ndarray) -> None:
        self.sent.append(action)

    def hold(self) -> None:
        pass


def recorded(names: Namespace) -> None:
    """The dataset of the writer has the frame, and the robot sent what the player played."""
    from pi0.datasets.lerobot import LeRobotDataset

    assert len(LeRobotDataset(Path("data/mine"))) == 1
    assert 0 < len(names["robot"].sent) == names["played"].steps


DROID = '"gs://openpi-assets/checkpoints/pi05_droid", preset="pi05_droid"'
SMALL_DROID = f'"droid", preset="pi05_droid", tokenizer="{RUN / "tokenizer.model"}"'
SERVER = {'"server", 8000': '"127.0.0.1", {port}'}
FRAME = observation()
IMAGES = {"image": FRAME["corner"], "wrist": FRAME["wrist"], "state": FRAME["state"]}

PAGES = {
    "README.md": Page(
        {DROID: SMALL_DROID},
        {
            "exterior": np.zeros((180, 320, 3), np.uint8),
            "wrist": np.zeros((180, 320, 3), np.uint8),
            "joints": np.zeros(7),
            "gripper": np.zeros(1),
        },
        droid_run,
        with_shape("actions", 15, 8),
    ),
    "docs/add_robot.md": Page(),
    "docs/ci.md": Page(prepare=pair, check=lambda names: names["test_exported_model"]()),
    "docs/export.md": Page(
        given={"corner": FRAME["corner"], **IMAGES}, prepare=to_onnx, check=with_shape("actions", None, 4)
    ),
    "docs/finetune.md": Page(SERVER, IMAGES, check=trains),
    "docs/peers.md": Page({DROID: SMALL_DROID}, {"pi0_torch": pi0_torch}, droid_run),
    "docs/quantize.md": Page(prepare=quantized),
    "docs/recipe.md": Page(
        given={"frame": FRAME, "config": find_experiment("pi05_posttrain")()},
        prepare=posttrained,
        check=recipe,
    ),
    "docs/rtc.md": Page(given={"pi0_torch": pi0_torch, "observation": FRAME}, prepare=exported),
    "docs/run.md": Page(given=IMAGES, prepare=exported, check=with_shape("result", None, 4)),
    "docs/serving.md": Page(
        SERVER
        | {
            'api_key="…"': f'api_key="{KEY}"',
            "ChunkPlayer(client": f'ChunkPlayer(Client("127.0.0.1", {{port}}, api_key="{KEY}")',
            "steps=1000": "steps=20",
            '"shape": [7]': '"shape": [4]',
            "[480, 640, 3]": "[30, 40, 3]",
        },
        IMAGES
        | {"robot": Arm(), "observe": observation, "low": -np.ones(4), "high": np.ones(4), "action": FRAME["state"]},
        check=recorded,
        left_out={1: "openpi-client is not on PyPI; tests/pi0_serve runs its protocol"},
    ),
}
SLOW = {"docs/ci.md", "docs/serving.md"}  # a comparison by parity, and the time that a robot takes


def test_every_page_with_code_is_run():
    assert {str(page.relative_to(ROOT)) for page in ALL_PAGES if blocks(page, "python")} == PAGES.keys()


@pytest.mark.parametrize("name", [pytest.param(p, marks=pytest.mark.slow if p in SLOW else ()) for p in PAGES])
def test_the_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page, code = PAGES[name], blocks(ROOT / name, "python")
    monkeypatch.chdir(tmp_path)
    page.prepare(tmp_path)
    names: Namespace = {"__name__": "docs", "np": np, **page.given}
    with contextlib.ExitStack() as stack:
        port = 0
        if any("{port}" in text for text in page.texts.values()):
            policy = pi0_torch.Policy.from_pretrained(write_tiny(tmp_path / "served"))
            port = stack.enter_context(serve(policy)).port
        replaced = set()
        for number, text in enumerate(code):
            if number in page.left_out:
                continue
            for old, new in page.texts.items():
                if old in text:
                    replaced.add(old)
                    text = text.replace(old, new.replace("{port}", str(port)))
            exec(compile(text, f"{name}, block {number}", "exec", dont_inherit=True), names)
        assert replaced == page.texts.keys()
    page.check(names)
