"""Programs as ONNX files, by PyTorch's exporter from torch.export."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from pi0.plugins import require_extra
from pi0.policy.programs import Program

OPSET = 20


def write_onnx(exported: ExportedProgram, program: Program, stages: list[str], file: Path) -> None:
    """Write `trace`'s program to `file`, its weights beside it to `file`.data.

    The values that are stages have their names, and are outputs of no program: `pi0.policy.exported` makes them
    some to compare them.
    """
    require_extra("export", "onnx", "onnxscript")
    import onnx_ir as ir

    names = [x.name for x in program.inputs], [*(x.name for x in program.outputs), *stages]
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # torchvision is missing
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about itself
        made: Any = torch.onnx.export(
            exported, input_names=names[0], output_names=names[1], opset_version=OPSET, dynamo=True, verbose=False
        )
    graph = made.model.graph
    del graph.outputs[len(program.outputs) :]
    for value, x in zip([*graph.inputs, *graph.outputs], [*program.inputs, *program.outputs], strict=True):
        value.shape = ir.Shape(x.shape)
    made.save(file, external_data=True)
