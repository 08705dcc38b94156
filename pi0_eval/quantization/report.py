"""Which layers quantization hurts most, and the fewest that have to stay wide for a given action error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pi0.quantization import WIDE, QuantizationConfig
from pi0_eval.quantization.measure import ActionError, Quantizable, loss, stage_errors


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """The error of one layer alone in its format, and the bytes of its weights."""

    name: str
    format: str
    error: ActionError
    wide_bytes: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """A choice of layers that stay `wide`, the others quantized: error, bytes, loss and stages of it."""

    wide: list[str]
    error: ActionError
    bytes: int
    loss: float
    stages: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured on `frames` frames. `layers` are in order of their error, the largest first.

    `variants` are by name: "quantized" has no layer wide but those of the config; "worst wide" the worst of them, and
    "searched" the result of the search, where there was one. `curve` has the mean action error by the number of worst
    layers that are wide, as the search tried them. Milliseconds are for one frame. Units are those of the dataset.
    """

    subject: str
    frames: int
    config: QuantizationConfig
    action_names: list[str]
    action_range: list[float]
    wide_bytes: int
    wide_loss: float
    milliseconds: dict[str, float]
    layers: list[LayerRow]
    variants: dict[str, Variant]
    max_error: float | None
    curve: dict[int, float]

    @property
    def chosen(self) -> QuantizationConfig:
        """The config of the search or, without one, the one that was measured."""
        wide = self.variants["searched"].wide if "searched" in self.variants else []
        return dataclasses.replace(self.config, layers={**self.config.layers, **dict.fromkeys(wide, WIDE)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"chosen": dataclasses.asdict(self.chosen)}

    def to_text(self, most: int) -> str:
        """The report as text, with the `most` worst layers."""
        lines = [self.subject, "", f"{'':<16}{'wide':>6}{'MB':>8}{'size':>8}{'loss':>10}{'change':>9}"]
        lines[-1] += f"{'action error':>14}{'largest':>9}   of the recorded range"
        lines.append(f"{'as it is':<16}{'all':>6}{self.wide_bytes / 1e6:>8.1f}{1:>8.1%}{self.wide_loss:>10.4f}")
        for name, v in self.variants.items():
            size, change = v.bytes / self.wide_bytes, v.loss / self.wide_loss - 1
            lines.append(
                f"{name:<16}{len(v.wide):>6}{v.bytes / 1e6:>8.1f}{size:>8.1%}{v.loss:>10.4f}{change:>+9.2%}"
                f"{v.error.mean:>14.3%}{v.error.largest:>9.2%}"
            )
        whole = self.variants["quantized"]
        lines += ["", f"mean action error by dimension, {' and '.join(self.variants)}:"]
        width = max(map(len, self.action_names))
        for i, (name, span) in enumerate(zip(self.action_names, self.action_range, strict=True)):
            own = "".join(f"{v.error.units[i]:>12.4g}" for v in self.variants.values())
            lines.append(f"  {name:<{width}}{own}   range {span:.4g}")
        lines += [
            "",
            "milliseconds for a frame, in turns: " + ", ".join(f"{n} {t:.1f}" for n, t in self.milliseconds.items()),
        ]
        lines += ["", "relative error of stages, quantized:"]
        lines += [f"  {name:<20}{error:.2e}" for name, error in whole.stages.items()]
        lines += ["", f"layers that hurt most, each alone ({min(most, len(self.layers))} of {len(self.layers)}):"]
        lines += [f"  {'':<56}{'action error':>12}{'largest':>9}{'outputs':>10}"] if most else []
        for row in self.layers[:most]:
            error = f"{row.error.mean:>12.4%}{row.error.largest:>9.2%}{row.error.outputs:>10.1e}"
            lines.append(f"  {row.name:<44}{row.format:<12}{error}")
        if self.max_error is not None:
            kept = self.variants["searched"].wide
            lines += ["", f"for an action error of at most {self.max_error:.3%}, {len(kept)} layers stay wide:"]
            lines += [f"  {name}" for name in kept]
        return "\n".join(lines)


def make_report(
    subject: str,
    case: Quantizable,
    action_names: Sequence[str],
    *,
    max_error: float | None = None,
    worst: int = 5,
    repeats: int = 10,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure a case: whole, layer by layer, with the `worst` layers wide, and with the fewest for `max_error`.

    `max_error` is the mean action error as a fraction of the recorded range; None: no search.
    """
    case.keep_wide(case.quantized)
    wide_bytes = case.stored()
    rows = []
    for i, name in enumerate(case.quantized):
        case.quantize_one(name)
        rows.append(LayerRow(name, case.formats[name], case.error(), *case.layer_bytes(name)))
        progress(f"layer {i + 1} of {len(case.quantized)}: {name}, action error {rows[-1].error.mean:.4%}")
    rows.sort(key=lambda row: (row.error.mean, row.error.outputs), reverse=True)
    order = [row.name for row in rows]
    choices: dict[str, list[str]] = {"quantized": []}
    choices |= {"worst wide": order[:worst]} if worst else {}
    curve: dict[int, float] = {}
    if max_error is not None:
        choices["searched"] = search(case, order, max_error, curve, progress)
    variants = {}
    for name, kept in choices.items():
        progress(f"{name}: loss and stages")
        case.keep_wide(kept)
        model = case.simulated(kept)
        stages = stage_errors(case.policy.model, model, case.frames, case.batch)
        variants[name] = Variant(kept, case.error(), case.stored(), loss(model, case.frames, case.batch), stages)
    return Report(
        subject,
        len(case.frames),
        case.config,
        list(action_names),
        case.action_range.tolist(),
        wide_bytes,
        loss(case.policy.model, case.frames, case.batch),
        case.latency(repeats),
        rows,
        variants,
        max_error,
        dict(sorted(curve.items())),
    )


def search(
    case: Quantizable,
    order: Sequence[str],
    max_error: float,
    curve: dict[int, float],
    progress: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """The layers to keep wide for a mean action error of at most `max_error`, few of them, worst first.

    Of the layers in `order`, the worst first, it keeps the least number, found by bisection; then, from the least
    harmful on, it quantizes each again where the error allows it. `curve` receives the errors of the bisection.
    """

    def error(kept: Sequence[str]) -> float:
        case.keep_wide(kept)
        return case.error().mean

    def of_worst(count: int) -> float:
        if count not in curve:
            curve[count] = error(order[:count])
            progress(f"search: {count} worst layers wide, action error {curve[count]:.4%}")
        return curve[count]

    low, high = 0, len(order)  # with all of them wide there is no error
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if of_worst(middle) <= max_error else (middle + 1, high)
    kept = list(order[:high])
    if high and of_worst(high) > max_error:  # the error need not fall with every layer
        kept = list(order)
    for name in reversed(kept[:]):
        fewer = [other for other in kept if other != name]
        if error(fewer) <= max_error:
            kept = fewer
            progress(f"search: {name} quantized again, {len(kept)} stay wide")
    return kept
