"""Describe a checkpoint by names, shapes and metadata alone: `inspect`, `pi0-inspect`."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from convert.checkpoints import find_assets, read_tensors
from convert.detection import detect
from convert.formats.orbax import orbax_paths
from convert.layouts.layout import Layout
from convert.layouts.registry import LAYOUTS, find_layout
from convert.sidecars import failed_parity, norm_stats_files
from pi0.assets import AssetsError
from pi0.command import add_head_dims, add_preset, exit_on_error, make_parser
from pi0.config import ModelConfig
from pi0.parameters import LayoutError
from pi0.presets import PRESETS, fitting_presets
from pi0.reading import naming


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A description of a checkpoint.

    `config` is None where it does not follow from the shapes; `assumed` are its fields that no file says, and `presets`
    the openpi configs that it may have been trained with, which say them. `robot` is None where no file names it.
    `notes` say what is read otherwise than stored, and whether it failed a comparison.
    `problems` is empty for a valid checkpoint. `dtypes` counts tensors by dtype for each part of the model;
    `parameters` is their total number.
    """

    folder: Path
    layout: str
    style: str
    kind: str
    config: ModelConfig | None
    assumed: tuple[str, ...]
    presets: list[str]
    robot: str | dict[str, Any] | None
    lora_experts: tuple[str, ...]
    dtypes: dict[str, dict[str, int]]
    parameters: int
    norm_stats: list[str]
    step: int | None
    notes: list[str]
    problems: list[str]

    def to_dict(self) -> dict[str, object]:
        """Plain values that JSON can hold."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"folder": str(self.folder), "config": self.config and self.config.to_dict()}

    def text(self) -> str:
        """The description as text."""
        lines = [
            f"{self.folder}",
            f"layout       {self.layout}, {self.style}",
            f"model        {self.kind}{', LoRA on ' + ' and '.join(self.lora_experts) if self.lora_experts else ''}",
            f"parameters   {self.parameters:,}",
        ]
        lines += [
            f"{group:<12} {', '.join(f'{count} x {dtype}' for dtype, count in counts.items())}"
            for group, counts in self.dtypes.items()
        ]
        for name, value in (self.config.to_dict() if self.config else {}).items():
            mark = "   (assumed: as in released models, no file says it)" if name in self.assumed else ""
            lines.append(f"  {name:<17} {value}{mark}")
        if self.assumed or self.presets:
            fitting = [f"{name} (horizon {PRESETS[name].action_horizon})" for name in self.presets]
            lines.append(f"presets      {', '.join(fitting) or 'none'} of openpi {'fit' if fitting else 'fits'}")
        lines.append(f"robot        {self.robot or 'unknown'}")
        lines.append(f"norm stats   {', '.join(self.norm_stats) or 'none'}")
        lines.append(f"step         {'unknown' if self.step is None else self.step}")
        lines += [f"note         {note}" for note in self.notes]
        lines += ["fits         yes"] if not self.problems else ["fits         NO", *self.problems]
        return "\n".join(lines)


def inspect(
    source: str | Path,
    *,
    layout: str | Layout | None = None,
    step: int | None = None,
    preset: str | None = None,
    head_dims: tuple[int, int] | None = None,
) -> Inspection:
    """Describe a checkpoint without reading its weights; see `open_checkpoint`. Raises CheckpointError, LayoutError."""
    stored = read_tensors(source, step=step, in_place=True)
    shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
    with naming(stored.folder):
        layout, kind, lora = detect(shapes, LAYOUTS.values() if layout is None else [find_layout(layout)])
    assets, problems = None, []
    notes: list[str] = []
    try:
        assets, tensors, notes = find_assets(stored, layout, kind, lora, preset=preset, head_dims=head_dims)
        layout.check(assets.model, {name: tensor.shape for name, tensor in tensors.items()})
    except (LayoutError, AssetsError) as error:
        problems.append(str(error))
    if (failure := failed_parity(stored.sidecars)) is not None:
        notes = [*notes, failure]
    dtypes: dict[str, collections.Counter[str]] = {}
    for name, tensor in stored.tensors.items():
        dtypes.setdefault(_group(name), collections.Counter())[tensor.dtype.name] += 1
    norm_stats = list(norm_stats_files(stored.sidecars)) or ([assets.asset_id] if assets and assets.asset_id else [])
    return Inspection(
        folder=stored.folder,
        layout=layout.name,
        style=_style(stored.weights),
        kind=kind,
        config=assets.model if assets else None,
        assumed=assets.assumed if assets else (),
        presets=fitting_presets(assets.model, assets.assumed, norm_stats) if assets else [],
        robot=assets.robot if assets else None,
        lora_experts=lora,
        dtypes={group: dict(counts) for group, counts in dtypes.items()},
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        norm_stats=norm_stats,
        step=assets.step if assets is not None else None,
        notes=notes,
        problems=problems,
    )


def _style(weights: Path) -> str:
    """The file format. openpi's training runs write leaves named `value`, its releases do not."""
    if weights.is_file():
        return "safetensors"
    leaves = {path[-1] for path in orbax_paths(weights)[1]}
    return "Orbax, training style" if leaves == {"value"} else "Orbax"


def _group(name: str) -> str:
    """The part of the model that a tensor of any layout belongs to, by its name."""
    groups = (
        ("LoRA", ("lora_a", "lora_b", "lora/", "lora.")),
        ("vision", ("vision", "/img/", "multi_modal_projector")),
        ("expert", ("action_expert", "gemma_expert", "_1/")),
        ("PaliGemma", ("paligemma", "PaliGemma")),
    )
    return next((group for group, parts in groups if any(part in name for part in parts)), "projections")


@exit_on_error("pi0-inspect")
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-inspect`; exits with 1 where the checkpoint fits no layout."""
    parser = make_parser(
        "pi0-inspect",
        "Describe a checkpoint by the names and shapes of its tensors and its sidecar files, never by its path: layout "
        "and style, model, sizes, dtypes, parameters, LoRA, norm stats, step, and what does not fit. Weights are not "
        "read.",
        "examples:\n  pi0-inspect runs/demo\n  pi0-inspect gs://openpi-assets/checkpoints/pi05_base --json",
    )
    parser.add_argument("source", help="the folder of a checkpoint or of a training run, gs:// or hf://")
    parser.add_argument("--layout", metavar="NAME", help='default: detected; a name or "module:NAME"')
    parser.add_argument("--step", type=int, help="of a training run (default: the newest)")
    add_preset(parser)
    add_head_dims(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    found = inspect(args.source, layout=args.layout, step=args.step, preset=args.preset, head_dims=args.head_dims)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.text())
    sys.exit(1 if found.problems else 0)
