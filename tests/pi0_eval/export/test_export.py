"""`pi0-export`: exports of small models, the gate, and faults that it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pi0_torch.sampler
from pi0 import numerics
from pi0.policy.manifest import ExportError, Manifest
from pi0_eval.export import exporting
from pi0_eval.export.command import main
from pi0_eval.export.exporting import Options, export
from pi0_eval.export.gate import GateError
from pi0_torch.sampler import Sampler
from tests.export_case import save, small

FAMILIES = ("tiny", "tiny_pi05", "tiny_pi0_fast")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(small("tiny"), tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="session")
def pt2(checkpoint: Path) -> Path:
    """Any batch up to 2, one camera or two, two lengths of prompts: each of these is compared."""
    folder = checkpoint.parent / "pt2"
    sizes = ["--batch", "1-2", "--cameras", "1-2", "--prompts", "4", "8"]
    main([str(checkpoint), str(folder), "--to", "pt2", *sizes])
    return folder


def test_the_manifest_says_what_it_is(pt2: Path, checkpoint: Path):
    manifest = Manifest.load(pt2)
    assert manifest.source["checkpoint"] == "tiny" and len(manifest.source["checksum"]) == 16
    assert manifest.versions["torch"] == torch.__version__.partition("+")[0] or manifest.versions["torch"]
    assert len(manifest.gate["cases"]) == 3 and manifest.gate["passed"]  # sets of cameras
    program = manifest.programs["sample"].program
    assert [x.name for x in program.inputs] == ["images", "image_masks", "prompt", "prompt_mask", "state", "noise"]
    assert program.inputs[0].shape == ("batch", "cameras", 28, 42, 3)
    stages = list(manifest.gate["stages"])
    assert stages[0] == "vision layer 0" and stages[-1] == "actions" and "step 2 suffix layer 1" in stages
    assert max(figures["error"] for figures in manifest.gate["stages"].values()) < 1.2e-5


LOAD = """
import json, sys
import numpy as np, torch
program = torch.export.load(sys.argv[1]).module()
inputs = [torch.from_numpy(x) for x in np.load(sys.argv[2]).values()]
np.save(sys.argv[3], program(*inputs)[0].numpy())
assert not [name for name in sys.modules if name.startswith(("pi0", "convert"))]
"""


def test_it_runs_without_this_project(pt2: Path, checkpoint: Path, tmp_path: Path):
    import pi0_torch
    from pi0_eval.export.gate import random_case

    config = small("tiny")
    case = random_case(config, 2, config.image_keys, (5, 8), None, np.random.default_rng(1))
    observation = case.observation
    arrays = [np.stack(list(x.values()), 1) for x in (observation.images, observation.image_masks)]
    arrays += [observation.tokenized_prompt, observation.tokenized_prompt_mask, observation.state, case.noise]
    np.savez(tmp_path / "inputs.npz", **{str(i): x for i, x in enumerate(arrays)})
    files = [str(pt2 / "sample.pt2"), str(tmp_path / "inputs.npz"), str(tmp_path / "actions.npy")]
    subprocess.run([sys.executable, "-c", LOAD, *files], cwd=tmp_path, check=True)
    model = pi0_torch.load(checkpoint)
    expected = model.sample(pi0_torch.to_device(observation), torch.from_numpy(case.noise)).numpy()
    actions = np.load(tmp_path / "actions.npy")
    assert np.linalg.norm(actions - expected) <= 3e-6 * np.linalg.norm(expected)


def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Sampler.__init__

    def init(self: Sampler, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        weight = self.weights["vision"]["layers"][1]["out"][0]
        weight.data = weight.data.T.contiguous()

    monkeypatch.setattr(Sampler, "__init__", init)


def other_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "RMS_NORM_EPS", 1e-5)


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pi0_torch.sampler.mask_bias
    monkeypatch.setattr(pi0_torch.sampler, "mask_bias", lambda mask, config: 0 * original(mask, config))


def shifted_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pi0_torch.sampler.rotation
    monkeypatch.setattr(pi0_torch.sampler, "rotation", lambda positions, *rest: original(positions + 1, *rest))


def shifted_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the suffix alone, where it is no shift of all."""
    original, width = pi0_torch.sampler.rotation, small("tiny").action_horizon + 1
    monkeypatch.setattr(
        pi0_torch.sampler,
        "rotation",
        lambda positions, *rest: original(positions + (positions.shape[1] == width), *rest),
    )


FAULTS = {
    transposed: "vision layer 1",
    other_epsilon: "prefix keys 0",
    no_mask: "prefix layer 0",
    shifted_rope: "prefix keys 0",
    shifted_suffix: "step 1 suffix layer 0",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("to", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_broken_export_is_refused_and_named_by_stage(
    to: str, fault: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The fault is there while the export is made, and gone when it is compared."""
    writer = exporting.WRITERS[to]

    def write(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            return writer(*args)

    monkeypatch.setitem(exporting.WRITERS, to, write)
    with pytest.raises(GateError, match=f"the first stage out of tolerance is {FAULTS[fault]} "):
        export(checkpoint, tmp_path / "broken", Options(to, prompts=(8,)), most=2)
    assert list(tmp_path.iterdir()) == []


def test_norm_stats_of_a_file_are_named_after_the_robot(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They, and all that a policy needs, are written before programs, which take the time."""

    def stop(*args: Any) -> Any:
        assert (args[-1] / "assets" / "metaworld" / "norm_stats.json").is_file()
        raise ExportError("enough")

    monkeypatch.setitem(exporting.WRITERS, "pt2", stop)
    stats = Path("tests/written_before/stats/metaworld/norm_stats.json").resolve()
    given = {"robot": "metaworld", "norm_stats": stats, "tokenizer": "bundled://tokenizer.model"}
    with pytest.raises(ExportError, match="enough"):
        export(checkpoint, tmp_path / "export", Options("pt2"), **given)
    assert not (tmp_path / "export").exists()
