"""Every format of every family, on every set of cameras, length of prompts and batch size: `--run-slow`.

The cheapest of each kind run always: π0-FAST's decode step as pt2, and StableHLO.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pi0_torch
from pi0.policy.manifest import FORMATS, ExportError
from pi0.policy.rtc import RTC
from pi0.quantization import QuantizationConfig
from pi0.variants import get_variant
from pi0_eval.export.exporting import Options, export
from pi0_eval.export.gate import random_case
from tests.export_case import save, small
from tests.pi0_eval.parity.test_compare import random_checkpoint, write

ROOT = Path(__file__).parents[3]
SLOW = pytest.mark.slow
EXAMPLES = ROOT / "scripts" / "export"


def options(to: str, config, split: bool = False, **changes) -> Options:
    cameras = (1, 2) if config.family.masked_cameras else None
    return Options(to, split, (1, 2), cameras, (4, config.max_token_len), **changes)


CASES = [
    *((variant, to, False) for variant in ("tiny", "tiny_pi05", "tiny_pi0_fast") for to in FORMATS),
    *(("tiny", to, True) for to in FORMATS),
]


@pytest.mark.parametrize(("variant", "to"), [("tiny_pi0_fast", "pt2"), ("tiny", "stablehlo")])
def test_one_row_of_all_cameras(variant: str, to: str, tmp_path: Path):
    config = small(variant, depth=1)
    source = save(config, tmp_path / "source")
    manifest = export(source, tmp_path / "export", Options(to, prompts=(config.max_token_len,)), most=1)
    assert manifest.gate["stages"]["tokens" if config.family.action_tokens else "actions"]["error"] <= 3e-6


QUANTIZED = [
    ("pt2", "int8"),
    *(pytest.param(to, f, marks=SLOW) for to in ("pt2", "onnx", "aoti") for f in ("int8", "int4")),
]


@pytest.mark.parametrize(("to", "quantize"), QUANTIZED)
def test_quantized_weights(to: str, quantize: str, tmp_path: Path):
    """The export has the numbers of the plain model with weights rounded alike, and files that are smaller."""
    if to == "onnx":
        pytest.importorskip("onnxscript", reason="the extra export is not installed")
    config = small("tiny", depth=1)
    source, options = save(config, tmp_path / "source"), Options(to, prompts=(config.max_token_len,))
    rounding = QuantizationConfig({"*": quantize, "action_out_proj": "wide"}, group_size=4)
    manifest = export(source, tmp_path / "q", dataclasses.replace(options, quantization=rounding), most=1)
    assert manifest.gate["stages"]["actions"]["error"] <= (1e-5 if to == "onnx" else 3e-6)
    assert manifest.quantization["vision.layers.0.mlp.up"] == quantize
    assert "action_out_proj" not in manifest.quantization
    wide = export(source, tmp_path / "wide", options, most=1)
    assert wide.quantization == {}
    if to == "pt2":
        assert stored_bytes(tmp_path / "q") < 0.5 * stored_bytes(tmp_path / "wide")
    if to == "onnx":  # which widens tensors of less than 8 KB when it is made
        import onnx

        stored = {x.name: x.data_type for x in onnx.load(str(tmp_path / "q" / "sample.onnx")).graph.initializer}
        narrow = onnx.TensorProto.INT8 if quantize == "int8" else onnx.TensorProto.UINT8
        assert stored["model.weights.embedding.0.values"] == narrow


def stored_bytes(folder: Path) -> int:
    """The bytes of an export's weights: its whole file has a text of the program, here more than these."""
    return sum(x.nbytes for x in torch.export.load(folder / "sample.pt2").state_dict.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"to": "stablehlo"}, "export to pt2, aoti or onnx"),
        ({"weights": "bfloat16"}, "give one of them"),
        ({"quantization": QuantizationConfig({"*": "w8a8"})}, "w8a8 rounds inputs"),
    ],
)
def test_quantization_that_is_refused(changes: dict, said: str):
    with pytest.raises(ExportError, match=said):
        Options(**({"to": "onnx", "quantization": QuantizationConfig({"*": "int8"})} | changes))


@SLOW
@pytest.mark.parametrize(("variant", "to", "split"), CASES)
def test_the_sources_actions(variant: str, to: str, split: bool, tmp_path: Path):
    """In the exhaustive gate; π0-FAST's tokens are the same."""
    if to == "onnx":
        pytest.importorskip("onnxscript", reason="the extra export is not installed")
    config = small(variant, depth=1 if to == "stablehlo" else 2)
    source = save(config, tmp_path / "source")
    manifest = export(source, tmp_path / "export", options(to, config, split), every=True)
    assert len(manifest.gate["cases"]) == (12 if config.family.masked_cameras else 4)
    last = "tokens" if config.family.action_tokens else "actions"
    limit = {"tokens": 0.0, "actions": 1e-5 if to == "onnx" else 3e-6}[last]
    assert manifest.gate["stages"][last]["error"] <= limit


@SLOW
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_policy_that_writes_subtasks(to: str, tmp_path: Path):

    checkpoint = random_checkpoint(small("tiny_pi05"))
    checkpoint = dataclasses.replace(checkpoint, assets=dataclasses.replace(checkpoint.assets, subtasks=True))
    source = write(checkpoint, tmp_path / "source", "pi0_torch")
    manifest = export(source, tmp_path / "export", options(to, checkpoint.assets.model), every=True)
    assert manifest.gate["stages"]["subtask"]["error"] == 0 and list(manifest.programs) == [
        "prefix",
        "decode",
        "denoise",
    ]


@SLOW
@pytest.mark.parametrize(
    ("to", "rtc"),
    [*((to, RTC("guided", "identity")) for to in ("pt2", "onnx", "stablehlo")), ("stablehlo", RTC("guided"))],
)
def test_real_time_chunking(to: str, rtc: RTC, tmp_path: Path):
    config = small("tiny", depth=1)
    source = save(config, tmp_path / "source")
    export(source, tmp_path / "export", options(to, config, True, rtc=rtc), most=3)


@SLOW
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_weights_are_stored_in_bfloat16(to: str, tmp_path: Path):
    """Half the size, and the same numbers as the source with these weights."""
    config = small("tiny_pi05")
    source, folder = save(config, tmp_path / "source"), tmp_path / "export"
    export(source, folder, Options(to, weights="bfloat16"), most=2)
    stored = torch.export.load(folder / "sample.pt2").state_dict if to == "pt2" else None
    if stored is not None:
        kinds = {name.rpartition(".")[0].rpartition(".")[2]: x.dtype for name, x in stored.items() if x.ndim == 2}
        assert kinds["qkv"] == kinds["down"] == torch.bfloat16


@SLOW
@pytest.mark.parametrize("to", ["pt2", "stablehlo"])
def test_bfloat16(to: str, tmp_path: Path):
    source = save(small("tiny"), tmp_path / "source")
    export(source, tmp_path / "export", Options(to, dtype="bfloat16"), most=2)


@SLOW
@pytest.mark.parametrize("to", ["pt2", "onnx", "stablehlo", "aoti"])
@pytest.mark.parametrize("variant", ["bench", "bench_pi05", "bench_pi0_fast"])
def test_58_million_parameters(variant: str, to: str, tmp_path: Path):
    source = write(random_checkpoint(get_variant(variant, max_decoding_steps=16)), tmp_path / "source", "pi0_torch")
    export(source, tmp_path / "export", Options(to), most=3)


@SLOW
@pytest.mark.parametrize(("variant", "script"), [("tiny", "run.py"), ("tiny_pi0_fast", "run_fast.py")])
def test_the_examples_in_python(variant: str, script: str, tmp_path: Path):
    config = small(variant)
    source, folder = save(config, tmp_path / "source"), tmp_path / "export"
    export(source, folder, Options("onnx"), most=1)
    case = random_case(config, 1, config.image_keys, (8, 8), None, np.random.default_rng(1))
    observation = case.observation
    arrays = {"images": np.stack(list(observation.images.values()), 1), "state": observation.state}
    arrays |= {"image_masks": np.stack(list(observation.image_masks.values()), 1)}
    arrays |= {"prompt": observation.tokenized_prompt, "prompt_mask": observation.tokenized_prompt_mask}
    arrays |= {} if case.noise is None else {"noise": case.noise}
    np.savez(tmp_path / "inputs.npz", **arrays)
    command = [
        sys.executable,
        str(EXAMPLES / script),
        str(folder),
        str(tmp_path / "inputs.npz"),
        str(tmp_path / "out.npy"),
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    model, found = pi0_torch.load(source), np.load(tmp_path / "out.npy")
    noise = None if case.noise is None else torch.from_numpy(case.noise)
    expected = model.sample(pi0_torch.to_device(observation), noise).numpy()
    if config.family.action_tokens:
        np.testing.assert_array_equal(found, expected)
    else:
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@SLOW
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake")), reason="there is no C++ compiler or no cmake")
def test_the_example_in_cpp(tmp_path: Path):
    """Built against PyTorch's C++ library, it gives the plain model's actions for zero images and noise."""
    config = small("tiny", depth=1)
    source, folder, build = save(config, tmp_path / "source"), tmp_path / "export", tmp_path / "build"
    export(source, folder, Options("aoti", prompts=(8,)), most=1)
    configure = ["cmake", "-S", str(EXAMPLES), "-B", str(build), f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    sizes = [2, *config.image_resolution, 8, config.state_size, config.action_horizon, config.action_dim]
    out = tmp_path / "actions.bin"
    subprocess.run([str(build / "run"), str(folder / "sample.pt2"), *map(str, sizes), str(out)], check=True)
    case = random_case(config, 1, config.image_keys, (8, 8), None, np.random.default_rng(0))
    zeros = {name: np.zeros_like(x) for name, x in case.observation.images.items()}
    text = np.zeros((1, 8), np.int32), np.ones((1, 8), bool)
    observation = pi0_torch.Observation(zeros, case.observation.image_masks, 0 * case.observation.state, *text)
    expected = pi0_torch.load(source).sample(pi0_torch.to_device(observation), torch.zeros(case.noise.shape)).numpy()
    actions = np.fromfile(out, np.float32).reshape(expected.shape)
    assert np.linalg.norm(actions - expected) <= 3e-6 * np.linalg.norm(expected)


def test_what_cannot_be_exported_is_refused_before_anything_is_made(tmp_path: Path):
    config = small("tiny")
    source = save(config, tmp_path / "source")
    for changes, message in {
        ("to", "tflite"): "it must be one of pt2, aoti, onnx, stablehlo",
        ("dtype", "bfloat16"): "onnxruntime has no bfloat16 on the CPU",
        ("rtc", RTC("guided")): "does not trace the exact Jacobian",
        ("cameras", (1, 4)): "cameras 1-4: π0 here has 2",
        ("prompts", (16,)): "the model's have at most 8",
    }.items():
        with pytest.raises(ExportError, match=message):
            export(source, tmp_path / "export", Options(**{"to": "onnx", changes[0]: changes[1]}))
    with pytest.raises(ValueError, match="it must be a positive number"):
        export(source, tmp_path / "export", Options("onnx", batch=(3, 1)))
    with pytest.raises(ValueError, match="was not trained with"):
        export(source, tmp_path / "export", Options("pt2", rtc=RTC("trained")))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text(json.dumps({}))
    with pytest.raises(FileExistsError):
        export(source, tmp_path / "there", Options("pt2"), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "there"]
