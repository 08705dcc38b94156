"""Export a checkpoint's sampler as programs that run without this project, once they passed the gate."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint, open_checkpoint
from pi0.assets import Assets, AssetsError, check_asset_id
from pi0.config import DTYPES, PROOF_DTYPE, ModelConfig
from pi0.datasets.registry import open_dataset
from pi0.fetch import fetch
from pi0.observation import Observation
from pi0.parameters import parameters
from pi0.policy.buckets import TEXT_BUCKETS, text_lengths
from pi0.policy.exported import ExportedSampler
from pi0.policy.manifest import FORMATS, MANIFEST, ExportError, Manifest, ProgramFile
from pi0.policy.policy import check_rtc, fill_assets
from pi0.policy.programs import Program, Sizes, programs
from pi0.policy.rtc import RTC, Previous
from pi0.quantization import CALIBRATED, WIDE, QuantizationConfig
from pi0.reading import naming
from pi0.robots.pipeline import Pipeline
from pi0.storage import new_folder, require_replaceable
from pi0_eval.actors import checksum
from pi0_eval.export.gate import cases, run_gate
from pi0_eval.export.runners import open_runner
from pi0_eval.export.source import Case, Source, jax_source, layer_formats, torch_source
from pi0_eval.parity.compare import SMALL
from pi0_eval.parity.frameworks import exact_matmuls

SUFFIX = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
PACKAGES = ("torch", "jax", "jaxlib", "onnx", "onnxscript", "onnxruntime", "numpy")
REPLACED = {
    "marker": (MANIFEST,),
    "files": (MANIFEST, "config.json", "assets", "*.pt2", "*.onnx*", "*.stablehlo", "weights.*"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is exported.

    Attributes:
        to: the format, one of `FORMATS`.
        split: whether prefix and denoising are programs of their own.
        batch, cameras: a size, or the smallest and the largest; all cameras of the model by default.
        prompts: the lengths that prompts are cut to (default: those of the samplers).
        dtype: in which it computes. weights: in which its weights are stored (default: the same).
        num_steps: Euler steps, or the most tokens (default: the checkpoint's).
        rtc: real-time chunking.
        quantization: to what the weights are rounded.
    """

    to: str
    split: bool = False
    batch: tuple[int, int] = (1, 1)
    cameras: tuple[int, int] | None = None
    prompts: tuple[int, ...] | None = None
    dtype: str = "float32"
    weights: str | None = None
    num_steps: int | None = None
    rtc: RTC | None = None
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        for name, known in (("to", FORMATS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ExportError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        if self.weights not in (None, self.dtype, "bfloat16"):
            raise ExportError(f"weights are {self.weights!r}; they are stored in {self.dtype} or bfloat16")
        if self.to == "stablehlo" and self.weights not in (None, self.dtype):
            raise ExportError(f"weights of an export to stablehlo are stored in the dtype it computes in, {self.dtype}")
        if self.rtc is not None and self.rtc.jacobian == "exact" and self.rtc.method == "guided" and self.to in SUFFIX:
            raise ExportError(
                "torch.export does not trace the exact Jacobian of guided real-time chunking; "
                "export with --jacobian identity, or --to stablehlo"
            )
        if self.to == "onnx" and self.dtype != "float32":
            raise ExportError(
                "onnxruntime has no bfloat16 on the CPU, where exports are compared with their source; "
                "export to onnx in float32, with --weights bfloat16 for half the size"
            )

        if self.quantization is not None:
            self._check_quantization(self.quantization)

    def _check_quantization(self, quantization: QuantizationConfig) -> None:
        if self.to == "stablehlo":
            raise ExportError("quantized weights are those of PyTorch's sampler; export to pt2, aoti or onnx")
        if self.weights not in (None, self.dtype):
            raise ExportError("weights and quantization both say how weights are stored; give one of them")
        if rounded := sorted(CALIBRATED.keys() & set(quantization.layers.values())):
            raise ExportError(
                f"{rounded[0]} rounds inputs, and a difference in the last bit moves some to another number: an export "
                "cannot be compared with its source; quantize weights alone (int8, int4, float8, bfloat16)"
            )

    def sizes(self, config: ModelConfig) -> Sizes:
        """The sizes of calls. Raises ExportError for those that the model does not have."""
        count = len(config.image_keys)
        cameras = (count, count) if self.cameras is None else self.cameras
        if cameras[1] > count or (cameras != (count, count) and not config.family.masked_cameras):
            raise ExportError(f"cameras {cameras[0]}-{cameras[1]}: {config.family.title} here has {count}")
        lengths = text_lengths(config, TEXT_BUCKETS) if self.prompts is None else self.prompts
        if max(lengths, default=0) > config.max_token_len:
            raise ExportError(f"prompts of {max(lengths)} tokens: the model's have at most {config.max_token_len}")
        return Sizes(self.batch, cameras, tuple(lengths))


def export(
    source: str | Path,
    target: Path,
    options: Options,
    *,
    asset_id: str | None = None,
    preset: str | None = None,
    head_dims: tuple[int, int] | None = None,
    data: str | None = None,
    frames: int = 4,
    most: int | None = None,
    every: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
    **overrides: Any,
) -> Manifest:
    """Export the checkpoint `source` to the folder `target`, which gets its name when the export passed the gate.

    Args:
        asset_id, preset, head_dims: see `open_checkpoint`; `overrides`: see `fill_assets`.
        data: a dataset of the robot, of which `frames` evenly spaced ones are compared, after random inputs.
        most, every: how many random inputs at most; whether all combinations (`gate.cases`).
        seed: of random inputs.
        log: called with a line for each step.

    Raises GateError that names the first stage out of tolerance, and ExportError, AssetsError, CheckpointError or
    FileExistsError; then nothing is left behind.
    """
    replaced: dict[str, Any] = REPLACED | {"sources": [] if "://" in str(source) else [Path(source).expanduser()]}
    require_replaceable(target, overwrite, **replaced)
    checkpoint = open_checkpoint(source, asset_id=asset_id, preset=preset, head_dims=head_dims)
    checkpoint, config = with_assets(checkpoint, options, overrides, log)
    assets, sizes = checkpoint.assets, options.sizes(config)
    if data is not None and assets.robot is None:
        raise AssetsError("--data needs a robot's adapter and norm stats, which the checkpoint does not have")
    tokens = config.family.action_tokens or assets.subtasks
    room = config.runtime.max_decoding_steps if tokens else 0
    formats: dict[str, str] = {}
    if options.quantization is not None:
        formats = layer_formats(config, options.quantization, assets.subtasks)
    wanted = programs(config, sizes, rtc=options.rtc, room=room, split=options.split)
    with naming(checkpoint.folder), new_folder(target, overwrite, **replaced) as folder, exact_matmuls():
        log(f"exporting {', '.join(wanted)} to {options.to}")
        whole = dataclasses.replace(assets, model=config)
        whole.save(folder / "assets", folder)
        made = WRITERS[options.to](checkpoint, config, options, wanted, sizes.ranges(config, room), folder)
        gc.collect()
        manifest = Manifest(
            options.to,
            made,
            sizes,
            num_steps=config.runtime.max_decoding_steps if config.family.action_tokens else config.runtime.num_steps,
            room=room,
            dtype=options.dtype,
            weights=options.weights or options.dtype,
            rtc=options.rtc,
            subtasks=assets.subtasks,
            quantization={name: format for name, format in formats.items() if format != WIDE},
            source={"checkpoint": checkpoint.folder.name, "checksum": checksum(str(source))},
            versions=versions(),
        )
        manifest.save(folder)
        loaded = Manifest.load(folder)
        sampler = ExportedSampler(loaded, config, open_runner(folder, loaded))
        log("comparing it with its source")
        inputs = cases(config, sizes, options.rtc, most=most, every=every, seed=seed)
        recorded = () if data is None else recorded_cases(whole, data, frames, sizes, options.rtc, seed)
        figures = run_gate(sampler, *sources(checkpoint, config, options, formats), chain(inputs, recorded), log)
        manifest = dataclasses.replace(manifest, gate=figures)
        manifest.save(folder)
        del sampler
    return manifest


def chain(*parts: Iterator[Case] | Sequence[Case]) -> Iterator[Case]:
    """Cases one after the other."""
    for part in parts:
        yield from part


def with_assets(
    checkpoint: Checkpoint, options: Options, overrides: Mapping[str, Any], log: Callable[[str], None]
) -> tuple[Checkpoint, ModelConfig]:
    """The checkpoint with the assets of a policy, where it has them, and the config of what is exported."""
    assets, given = checkpoint.assets, {name: value for name, value in overrides.items() if value is not None}
    with naming(checkpoint.folder):
        if assets.robot is not None or given:
            assets = fill_assets(assets, checkpoint.norm_stats, **given)
            Pipeline.from_assets(assets)
            if assets.asset_id is None and assets.norm_stats is not None:  # those of `norm_stats`
                robot = assets.robot["name"] if isinstance(assets.robot, dict) else str(assets.robot)
                assets = dataclasses.replace(assets, asset_id=check_asset_id(robot.replace(":", "_")))
            assets = with_local_tokenizer(assets)
        else:
            log("the checkpoint names no robot: the export has programs, and is no policy")
        if options.rtc is not None:
            check_rtc(options.rtc, assets)
    tokens = assets.model.family.action_tokens
    steps = {} if options.num_steps is None else {"max_decoding_steps" if tokens else "num_steps": options.num_steps}
    config = assets.model.with_runtime(dtype=options.dtype, remat="none", **steps)
    return dataclasses.replace(checkpoint, assets=dataclasses.replace(assets, model=config)), config


def with_local_tokenizer(assets: Assets) -> Assets:
    """The assets with a text tokenizer that is a file of this machine, which `Assets.save` copies."""
    reference = assets.tokenizer
    if reference is None or "://" not in reference["source"]:
        return assets
    return dataclasses.replace(assets, tokenizer=reference | {"source": str(fetch(reference["source"]))})


def write_torch(
    checkpoint: Checkpoint,
    config: ModelConfig,
    options: Options,
    wanted: Mapping[str, Program],
    ranges: Mapping[str, tuple[int, int]],
    folder: Path,
) -> dict[str, ProgramFile]:
    """Write programs of PyTorch's sampler, as pt2, aoti or onnx."""
    import torch

    from pi0_torch.export.onnx import write_onnx
    from pi0_torch.export.pt2 import trace, without_stages, write_aoti, write_pt2
    from pi0_torch.loading import load_model
    from pi0_torch.quantization import quantize
    from pi0_torch.sampler import Sampler

    model = load_model(checkpoint, dtype=config.runtime.dtype, param_dtype=options.weights or config.runtime.dtype)
    how: dict[str, Any] = {"subtasks": checkpoint.assets.subtasks, "rtc": options.rtc}
    kept = None if options.weights in (None, options.dtype) else getattr(torch, options.weights)
    sampler = Sampler(model, compile=False, warm_up=False, kept=kept, **how)
    del model
    if options.quantization is not None:
        quantize(sampler, options.quantization)
    made = {}
    for name, program in wanted.items():
        exported, stages = trace(sampler, name, program, ranges)
        file = folder / f"{name}{SUFFIX[options.to]}"
        if options.to == "onnx":
            write_onnx(exported, program, stages, file)
        else:
            exported = without_stages(exported, len(program.outputs), stages)
            (write_pt2 if options.to == "pt2" else write_aoti)(exported, file)
        made[name] = ProgramFile(file.name, program, tuple(stages) if options.to != "aoti" else ())
    return made


def write_jax(
    checkpoint: Checkpoint,
    config: ModelConfig,
    options: Options,
    wanted: Mapping[str, Program],
    ranges: Mapping[str, tuple[int, int]],
    folder: Path,
) -> dict[str, ProgramFile]:
    """Write programs of JAX's sampler, as StableHLO."""
    from pi0_jax.export import write_programs
    from pi0_jax.loading import load_model
    from pi0_jax.sampler import Sampler

    model = load_model(checkpoint, dtype=config.runtime.dtype, param_dtype=config.runtime.dtype)
    sampler = Sampler(model, subtasks=checkpoint.assets.subtasks, rtc=options.rtc, warm_up=False)
    files = write_programs(sampler, wanted, ranges, folder)
    return {name: ProgramFile(file, wanted[name], tuple(stages)) for name, (file, stages) in files.items()}


WRITERS: dict[str, Callable[..., dict[str, ProgramFile]]] = {
    "pt2": write_torch,
    "aoti": write_torch,
    "onnx": write_torch,
    "stablehlo": write_jax,
}


def sources(
    checkpoint: Checkpoint, config: ModelConfig, options: Options, formats: Mapping[str, str]
) -> tuple[Source, Source | None]:
    """The stages of the checkpoint's plain model, and of a small or narrow one those in a wider dtype.

    Its layers are rounded to their `formats`.
    """
    make = jax_source if options.to == "stablehlo" else torch_source
    tokens = config.family.action_tokens
    steps = config.runtime.max_decoding_steps if tokens else config.runtime.num_steps
    how: dict[str, Any] = {"num_steps": steps, "rtc": options.rtc, "subtasks": checkpoint.assets.subtasks}
    if options.quantization is not None:
        how |= {"quantization": options.quantization, "formats": formats}
    weights = options.weights or options.dtype
    source = make(checkpoint, config, weights, **how)
    if options.dtype != "float32":
        return source, make(checkpoint, config.with_runtime(dtype="float32"), weights, **how)
    if sum(math.prod(p.shape) for p in parameters(config).values()) >= SMALL:
        return source, None
    return source, make(checkpoint, config.with_runtime(dtype=PROOF_DTYPE), PROOF_DTYPE, **how)


def recorded_cases(assets: Assets, data: str, frames: int, sizes: Sizes, rtc: RTC | None, seed: int) -> Iterator[Case]:
    """Evenly spaced frames of a dataset, each in the smallest batch that the export takes."""
    pipeline, config = Pipeline.from_assets(assets), assets.model
    dataset = open_dataset(data, pipeline.robot, action_horizon=config.action_horizon)
    batch, rng = sizes.batch[0], np.random.default_rng(seed)
    for i in np.linspace(0, len(dataset) - 1, frames).astype(int):
        row = pipeline(dataset[int(i)], actions=False)
        values = {key: np.stack([value] * batch) for key, value in row.items() if key != "actions"}
        observation = Observation.from_dict(values, config).prompt_only()
        noise = None
        if not config.family.action_tokens:
            noise = rng.normal(size=(batch, config.action_horizon, config.action_dim)).astype(np.float32)
        previous = None if rtc is None else Previous.none(*noise.shape)  # type: ignore[union-attr]
        yield Case(f"recorded, frame {i}", observation, noise, previous)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that an export is made and compared with."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
