"""Compare a checkpoint with an export, as `pi0-parity` does two checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.checkpoints import open_checkpoint
from pi0.assets import Assets
from pi0.config import PROOF_DTYPE
from pi0.policy.exported import ExportedSampler
from pi0.policy.manifest import ExportError, Manifest
from pi0.policy.rtc import Previous
from pi0_eval.export.gate import EXACT, comparable, error, run_stages, tolerance
from pi0_eval.export.runners import open_runner, require_format
from pi0_eval.export.source import Case, jax_source, torch_source
from pi0_eval.parity.compare import common_config, framework_of, units
from pi0_eval.parity.frameworks import exact_matmuls
from pi0_eval.parity.inputs import Inputs, ParityError
from pi0_eval.parity.policies import policy_rows
from pi0_eval.parity.report import Report, Row
from pi0_eval.parity.sides import Side, SideError


def compare_export(
    a: str | Path,
    b: str | Path,
    *,
    framework: str | None = None,
    device: str | None = None,
    side_a: Side = Side(),  # noqa: B008 -- frozen
    framework_a: str | None = None,
    dtype: str = "float32",
    inputs: Inputs | Path | None = None,
    batch: int = 2,
    seed: int = 0,
    num_steps: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run a checkpoint and an export on the same inputs, and compare every stage that the export shows.

    A runs as a plain model in float64 and in `dtype`; an export is what it is, and has the error of its dtype against
    A in float64 for a proof, of which the gate's tolerance is allowed (`gate.TOLERANCE`). `framework` is B's format,
    if it is to be checked; other arguments are those of `compare`. Raises ExportError, ParityError and SideError.
    """
    folder, checkpoint = Path(b).expanduser(), open_checkpoint(a)
    manifest, assets = Manifest.load(folder), Assets.load(folder)
    require_format(manifest, b, framework)
    if assets is None:
        raise ExportError(f"{folder} has no config.json; export it again")
    if manifest.dtype != "float32":
        raise ParityError(f"{b} computes in {manifest.dtype}; its manifest has how far it is from its source in it")
    if num_steps not in (None, manifest.num_steps):
        raise ParityError(f"--steps {num_steps}: the export has {manifest.num_steps} in its programs; leave it out")
    side = side_a.of(framework_a or framework_of(checkpoint), dtype)
    if side.path != "plain" or side.attention or side.device or side.compiled is not None:
        raise SideError(f"side {side}: beside an export A is a plain model on the CPU")
    sampler = ExportedSampler(manifest, assets.model, open_runner(folder, manifest, device))
    config = common_config(checkpoint.assets, assets).with_runtime(
        num_steps=assets.model.runtime.num_steps, max_decoding_steps=assets.model.runtime.max_decoding_steps
    )
    given = Inputs.of(inputs, config, batch, seed)
    tokens = config.family.action_tokens
    noise = None if tokens else given.noise
    previous = Previous.none(*given.noise.shape) if manifest.rtc is not None else None
    case = Case("inputs", given.observation.prompt_only(), noise, previous)
    make = {"jax": jax_source, "torch": torch_source}[side.framework or "torch"]
    how: dict[str, Any] = {"num_steps": manifest.num_steps, "rtc": manifest.rtc, "subtasks": manifest.subtasks}
    stages = []
    with exact_matmuls():
        for name in (PROOF_DTYPE, dtype):
            progress(f"computing A as {side.framework}:{name}")
            source = make(checkpoint, config.with_runtime(dtype=name), name, **how)
            stages.append(comparable(source(case), case, sampler, whole=True))
            del source
        progress(f"computing B as {manifest.to}")
        found = comparable(run_stages(sampler, case), case, sampler, whole=False)
    exact, rounded = stages
    rows = []
    for stage in (stage for stage in exact if stage in found):
        of_tokens = stage in EXACT
        allowed = tolerance(manifest, stage)
        own = error(exact[stage], rounded[stage], of_tokens), error(exact[stage], found[stage], of_tokens)
        apart = error(rounded[stage], found[stage], of_tokens)
        rows.append(Row(stage, own[1], *own, apart, allowed, limit=allowed))
    before, after = policy_rows(checkpoint.assets, assets, given)
    names = f"{checkpoint.folder} ({checkpoint.layout.name}, run as {side})", f"{b} (export, run as {manifest.to})"
    shown = rounded.get("actions"), found.get("actions")
    return Report(*names, dtype, [*before, *rows, *after], *shown, *units(checkpoint.assets), exported=True)
