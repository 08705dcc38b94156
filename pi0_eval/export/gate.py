"""The gate: an export is run beside its source, stage by stage, before it gets its name.

Axes: B batch, C cameras, S prefix tokens, K key/value heads, H head dim, W width.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.policy.exported import ExportedSampler
from pi0.policy.manifest import ExportError, Manifest
from pi0.policy.programs import Sizes
from pi0.policy.rtc import RTC, Previous
from pi0_eval.export.source import Case, Source, Stages

# The most by which actions in float32 may differ from the source's, in relative L2; and by how much more the stages
# before them, whose sums cancel more.
TOLERANCE = {"pt2": 3e-6, "aoti": 3e-6, "stablehlo": 3e-6, "onnx": 1e-5}
STAGES = 4.0
# And where the source has been computed more exactly, at most so many times as much as its own rounding error: in
# float32, where it is small, so that a wrong epsilon shows; and in bfloat16, where it is what may be expected.
ROUNDING = {"float32": 8.0, "bfloat16": 2.0}
LEAST = 1e-6  # of float32, since an error may be small by luck
EXACT = ("tokens", "subtask")  # no element may differ


class GateError(ExportError):
    """An export that is not numerically equivalent to its source; the message names the first stage that is out."""


@dataclasses.dataclass(frozen=True)
class Row:
    """How far a stage is from the source's in relative L2 (of tokens: the fraction that differs), and allowed to be."""

    case: str
    stage: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it is within what is allowed."""
        return self.error <= self.allowed  # NaN fails


def compare_case(sampler: ExportedSampler, source: Source, case: Case, exact: Source | None = None) -> list[Row]:
    """A row for each stage that both have, in order of computation.

    `exact` is the source in a wider dtype than that in which the export computes.
    """
    wanted = comparable(source(case), case, sampler, whole=True)
    found = comparable(run_stages(sampler, case), case, sampler, whole=False)
    own: dict[str, float] = {}
    if exact is not None:
        wide = comparable(exact(case), case, sampler, whole=True)
        own = {stage: error(wide[stage], x) for stage, x in wanted.items()}
    allowed = {stage: tolerance(sampler.manifest, stage, own.get(stage)) for stage in wanted}
    return [
        Row(case.name, stage, error(x, found[stage], stage in EXACT), allowed[stage])
        for stage, x in wanted.items()
        if stage in found
    ]


def tolerance(manifest: Manifest, stage: str, own: float | None = None) -> float:
    """How far from the source's a stage may be, whose rounding error in the source is `own`, where that is known."""
    if stage in EXACT:
        return 0.0
    if manifest.dtype != "float32":
        assert own is not None, "a narrow dtype is judged by the source's own error"
        return ROUNDING[manifest.dtype] * own
    most = TOLERANCE[manifest.to]
    if stage == "actions":
        return most
    return STAGES * most if own is None else max(ROUNDING["float32"] * own, LEAST)


def run_stages(sampler: ExportedSampler, case: Case) -> Stages:
    """The stages that an export shows, and what it samples."""
    found: Stages = {}
    if sampler.config.family.action_tokens:
        found["tokens"] = sampler.sample(case.observation, stages=found)
    elif sampler.subtasks:
        assert case.noise is not None
        sampled = sampler.sample_with_subtask(case.observation, case.noise, None, case.previous, stages=found)
        found["subtask"], found["actions"] = sampled
    else:
        found["actions"] = sampler.sample(case.observation, case.noise, case.previous, stages=found)
    return found


def comparable(stages: Stages, case: Case, sampler: ExportedSampler, whole: bool) -> Stages:
    """Stages without what is masked, and with axes in the source's order.

    `whole`: whether they are of all cameras and the whole prompt, as the source's are, or of those that the export got.
    """
    observation, config = case.observation, sampler.config
    got = sampler.cameras(observation)
    keys = list(config.image_keys) if whole else got
    length = config.max_token_len if whole else sampler.prompt_length(observation)
    masks = np.stack([observation.image_masks[key] for key in keys], axis=1)
    text = observation.tokenized_prompt_mask[:, :length]
    valid = np.concatenate([masks.repeat(config.image_tokens, axis=1), text], axis=1)
    batch, tokens = len(text), config.image_tokens
    chosen = [keys.index(key) for key in got]

    def one(stage: str, x: np.ndarray) -> np.ndarray:
        if stage.startswith("vision"):
            return x.reshape(batch, len(keys), *x.shape[1:])[:, chosen]
        if stage == "image tokens":
            return x.reshape(batch, len(keys), tokens, -1)[:, chosen]
        if stage.startswith(("prefix keys", "prefix values")) and not whole:
            x = x.swapaxes(1, 2)
        return x[valid] if stage.startswith("prefix") else x

    return {stage: one(stage, x) for stage, x in stages.items()}


def error(a: np.ndarray, b: np.ndarray, tokens: bool = False) -> float:
    """Relative L2 of b against a, of any shape, or the fraction of tokens that differ; infinite for other shapes."""
    if a.shape != b.shape:
        return math.inf
    if tokens:
        return float((a != b).mean())
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(b - a) / max(np.linalg.norm(a), np.finfo(np.float64).tiny))


def cases(
    config: ModelConfig,
    sizes: Sizes,
    rtc: RTC | None = None,
    *,
    most: int | None = None,
    every: bool = False,
    seed: int = 0,
) -> Iterator[Case]:
    """Random inputs that cover what an export promises: each set of cameras, each length of prompts, each end of the
    batch sizes; or with `every` all combinations of these. At most `most`.

    With more than one row, each but the first has cameras and a length of its own.
    """
    names = config.image_keys
    counts = range(1, min(sizes.cameras[1], len(names)) + 1) if config.family.masked_cameras else [len(names)]
    subsets = [s for n in counts for s in itertools.combinations(names, n)]
    batches = sorted({*sizes.batch})
    combined: list[Any] = list(itertools.product(subsets, sizes.prompts, batches))
    if not every:
        count = max(len(subsets), len(sizes.prompts), len(batches))
        combined = [tuple(one[-1 - i % len(one)] for one in (subsets, sizes.prompts, batches)) for i in range(count)]
    for i, (cameras, length, batch) in enumerate(combined[:most]):
        short = max((n for n in sizes.prompts if n < length), default=0)
        yield random_case(config, batch, cameras, (short + 1, length), rtc, np.random.default_rng((seed, i)))


def random_case(
    config: ModelConfig,
    batch: int,
    cameras: Sequence[str],
    lengths: tuple[int, int],
    rtc: RTC | None,
    rng: np.random.Generator,
) -> Case:
    """Random inputs with these cameras, and in the first row a prompt of one of these lengths."""
    height, width = config.image_resolution
    used = rng.integers(1, lengths[1] + 1, batch)
    used[0] = rng.integers(lengths[0], lengths[1] + 1)
    masks = {key: np.full(batch, key in cameras) for key in config.image_keys}
    if config.family.masked_cameras:
        for mask in masks.values():
            mask[1:] &= rng.random(batch - 1) < 0.5
    observation = Observation(
        images={key: rng.integers(0, 256, (batch, height, width, 3), np.uint8) for key in config.image_keys},
        image_masks=masks,
        state=rng.normal(size=(batch, config.state_size)).astype(np.float32),
        tokenized_prompt=rng.integers(0, config.vocab_size, (batch, config.max_token_len), np.int32),
        tokenized_prompt_mask=np.arange(config.max_token_len) < used[:, None],
    )
    name = f"random, batch {batch}, {'+'.join(cameras)}, {used[0]} tokens"
    if config.family.action_tokens:
        return Case(name, observation)
    shape = (batch, config.action_horizon, config.action_dim)
    noise = rng.normal(size=shape).astype(np.float32)
    if rtc is None:
        return Case(name, observation, noise)
    delay = int(rng.integers(0, config.action_horizon // 2 + 1))
    weights = np.broadcast_to(rtc.weights(config.action_horizon, delay, config.action_horizon)[:, None], shape)
    previous = Previous(rng.normal(size=shape).astype(np.float32), np.ascontiguousarray(weights, np.float32))
    return Case(f"{name}, delay {delay}", observation, noise, previous)


def run_gate(
    sampler: ExportedSampler,
    source: Source,
    exact: Source | None,
    inputs: Iterator[Case],
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare an export with its source on all inputs; the figures for its manifest.

    Raises GateError at the first case with a stage that is out, and names the first one.
    """
    worst: dict[str, Row] = {}
    names, manifest = [], sampler.manifest
    for case in inputs:
        rows = compare_case(sampler, source, case, exact)
        for row in rows:
            if not row.passed:
                raise GateError(refusal(manifest, row))
            if row.stage not in worst or not row.error <= worst[row.stage].error:
                worst[row.stage] = row
        names.append(case.name)
        last = rows[-1]
        log(f"{case.name}: {last.stage} {last.error:.1e}, allowed {last.allowed:.1e}")
    if not names:
        raise GateError("there are no inputs to compare on")
    largest = {row.stage: {"error": row.error, "allowed": row.allowed} for row in worst.values()}
    return {"passed": True, "measure": "relative L2", "cases": names, "stages": largest}


def refusal(manifest: Manifest, row: Row) -> str:
    """What is wrong with an export."""
    return (
        f"the export to {manifest.to} is not numerically equivalent to its source: the first stage out of tolerance is "
        f"{row.stage} ({row.error:.2e}, allowed {row.allowed:.2e}; {row.case}). Nothing was written"
    )
