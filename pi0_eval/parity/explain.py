"""Which operation parts: every operation of the failing stage, judged as stages are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint, open_checkpoint
from pi0.config import ModelConfig
from pi0.observation import Observation
from pi0.recording import Operation, recording
from pi0_eval.parity.compare import framework_of, judge
from pi0_eval.parity.frameworks import FRAMEWORKS, Results, exact_matmuls
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.report import Report, numbers
from pi0_eval.parity.sides import Side

COUNTED = ("vision layer", "layer")  # sections of which there are many
EXPERTS = ("prefix", "suffix")
UNMASKED = ("images", "vision layer", "image tokens")  # sections in which a masked camera is an image as well
SAMPLING = "sampling, "
OF_TEXT = ("vocabulary logits", "log probabilities")


def operations(checkpoint: Checkpoint, config: ModelConfig, inputs: Inputs, side: Side, steps: int) -> Results:
    """Every operation of the loss and then of sampling, by its section and name, in the side's dtype, uncompiled."""
    assert side.framework is not None
    config = config.with_runtime(dtype=side.dtype, remat="none")
    run = FRAMEWORKS[side.framework]
    with exact_matmuls(), recording() as found:
        run(checkpoint, config, inputs, steps, False, dataclasses.replace(side, compiled=False))
    return Results(named(found, config, inputs.observation), {})


def named(found: Sequence[Operation], config: ModelConfig, observation: Observation) -> dict[str, np.ndarray]:
    """The operations as arrays, a name each: what repeats within a section is numbered. Padding is zero.

    The names of those of sampling, which read the images again, say so, and from the second pass over the layers on
    which step it is. Each array has the shape of its operation, [B, ...].
    """
    result: dict[str, np.ndarray] = {}
    sampling, section, counts = False, "", dict.fromkeys(COUNTED, 0)
    valid = valid_tokens(observation, config)
    for i, operation in enumerate(found):
        if operation.name == "pixels" and i and not sampling and any(counts.values()):
            sampling, valid = True, valid_tokens(observation.prompt_only(), config)
            counts = dict.fromkeys(COUNTED, 0)
        if operation.section not in COUNTED:
            section = operation.section
        elif operation.name == "attention norm":
            depth = config.vision.depth if operation.section == "vision layer" else config.paligemma.depth
            step, layer = divmod(counts[operation.section], depth)
            section = f"{operation.section} {layer}" + (f" in step {step}" if step else "")
            counts[operation.section] += 1
        said = operation.name
        if said == "LoRA":  # is recorded right before the projection that it is added to
            said = f"LoRA of {found[i + 1].name}"
        values = operation.value if isinstance(operation.value, (list, tuple)) else [operation.value]
        for j, value in enumerate(values):
            if value is None:
                continue
            name = f"{SAMPLING if sampling else ''}{section}: {said}"
            name += f" of {EXPERTS[j]}" if len(values) > 1 else ""
            number, numbered = 1, name
            while numbered in result:
                number += 1
                numbered = f"{name} ({number})"
            result[numbered] = without_padding(_array(value), operation, config, valid)
    return result


def valid_tokens(observation: Observation, config: ModelConfig) -> np.ndarray:
    """The unmasked tokens of the prefix, bool [B, S]."""
    images = [np.repeat(observation.image_masks[key][:, None], config.image_tokens, 1) for key in config.image_keys]
    return np.concatenate([*images, observation.tokenized_prompt_mask], axis=1)


def without_padding(value: np.ndarray, operation: Operation, config: ModelConfig, valid: np.ndarray) -> np.ndarray:
    """The result [B, ...] of an operation with zeros for masked tokens.

    Their values mean nothing, and need not be the same. `valid` is bool [B, S] of the prefix. Logits are those of a
    query and a key; a mask's and a softmax's keys are kept, since masked ones have to be 0.
    """
    if operation.section in UNMASKED:
        return value
    batch, length = valid.shape
    suffix = config.family.state_tokens + config.action_horizon

    def tokens(count: int) -> np.ndarray:
        """Which of so many tokens are unmasked; those after the prefix all are."""
        if operation.name in OF_TEXT or operation.section == "text":  # logits predict the next token
            return valid[:, length - config.max_token_len :][:, :count]
        if count == length - 1 and config.family.action_tokens:  # the loss, where the last token predicts nothing
            return valid[:, :-1]
        if count < length or (count == suffix and not config.family.action_tokens):
            return np.ones((batch, count), bool)
        return np.pad(valid, ((0, 0), (0, count - length)), constant_values=True)

    if operation.name in ("logits", "softmax"):  # [B, K, G, T, S]
        rows = tokens(value.shape[3])[:, None, None, :, None]
        columns = tokens(value.shape[4])[:, None, None, None]
        return np.where(rows & columns if operation.name == "logits" else rows, value, 0)
    if value.ndim < 2 or operation.section in ("actions and noise", "suffix", "velocity"):
        return value
    rows = tokens(value.shape[1])
    return np.where(rows.reshape(*rows.shape, *[1] * (value.ndim - 2)), value, 0)


def _array(value: Any) -> np.ndarray:
    """On the host; bfloat16 as float32, which NumPy computes with."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    value = np.asarray(value)
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def explain(
    a: str | Path,
    b: str | Path,
    report: Report,
    *,
    side_a: Side,
    side_b: Side,
    inputs: Inputs | Path | None = None,
    batch: int = 2,
    seed: int = 0,
    num_steps: int = 10,
) -> str:
    """The first operation of two models that parts, with the values, for a `report` that failed.

    Sides are plain, and run as they say but for compilation, which shows no values. Operations of vision whose stage
    passed are left out: the bias of its keys changes logits alone.
    """
    failure = report.first_failure
    if failure is not None and failure.detail:
        return f"the first difference is in {failure.stage}: {failure.detail}"
    checkpoints = open_checkpoint(a), open_checkpoint(b)
    config = checkpoints[0].assets.model
    inputs = Inputs.of(inputs, config, batch, seed, all(c.assets.subtasks for c in checkpoints))
    sides = [
        side.of(side.framework or framework_of(checkpoint), report.dtype)
        for side, checkpoint in zip((side_a, side_b), checkpoints, strict=True)
    ]
    exact_a, exact_b, rounded_a, rounded_b = (
        operations(checkpoint, config, inputs, side, num_steps)
        for each in ([side.proof for side in sides], sides)
        for checkpoint, side in zip(checkpoints, each, strict=True)
    )
    passed = {row.stage for row in report.rows if row.passed}
    rows = judge(exact_a, exact_b, rounded_a, rounded_b, *(side.dtype or report.dtype for side in sides))
    rows = [row for row in rows if row.stage.removeprefix(SAMPLING).partition(":")[0] not in passed]
    found = Report(report.a, report.b, report.dtype, rows, None, None)
    row = found.first_failure
    if row is None:
        return "no operation of the forward pass parts: the difference is in gradients, or in rounding of compiled code"
    pair = (exact_a, exact_b) if not row.proved else (rounded_a, rounded_b)
    x, y = (np.asarray(results.stages[row.stage], np.float64) for results in pair)
    place = np.unravel_index(np.argmax(np.nan_to_num(abs(y - x), nan=np.inf)), x.shape)
    where = ", ".join(map(str, place))
    return (
        f"the first operation that parts is {row.stage} ({numbers(row)}); most at [{where}]: A {x[place]}, B {y[place]}"
    )
