"""Programs of torch.export (`.pt2`) and of AOTInductor: traced, written, and run on NumPy arrays.

A file of AOTInductor has native code of the machine that made it: run none that you do not trust.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.utils import _pytree

from pi0.policy.manifest import Manifest
from pi0.policy.programs import Program
from pi0.storage import below
from pi0_torch.export.modules import Exported, ProgramModule, examples
from pi0_torch.loading import to_numpy
from pi0_torch.models.lora import at_least_float32
from pi0_torch.sampler import Sampler

STAGE = "stage_"  # begins the names of the values that are stages


def trace(
    sampler: Sampler, name: str, program: Program, ranges: Mapping[str, tuple[int, int]]
) -> tuple[ExportedProgram, list[str]]:
    """A program by torch.export, and the names of its stages, which are outputs after the program's own.

    `ranges` are those of `Sizes.ranges`.
    """
    stages: list[str] = []
    module = ProgramModule(Exported(sampler), name, program, stages).train(False)
    arguments = examples(program, {axis: most for axis, (_, most) in ranges.items()}, sampler.device)
    dims = {axis: Dim(axis, min=least, max=most) for axis, (least, most) in ranges.items() if least < most}
    with torch.no_grad():
        shapes = dynamic_shapes(program, dims)
        return torch.export.export(module, arguments, dynamic_shapes=(shapes,), strict=False), stages


def dynamic_shapes(program: Program, dims: Mapping[str, Any]) -> tuple[dict[int, Any], ...]:
    """What `dims` has for the axes of each input that have no fixed size."""
    return tuple({i: dims[n] for i, n in enumerate(x.shape) if isinstance(n, str)} for x in program.inputs)


def without_stages(exported: ExportedProgram, outputs: int, stages: list[str]) -> ExportedProgram:
    """The program with its first `outputs` alone; values that were stages have `stage_node` for a name."""
    graph, signature = exported.graph_module.graph, exported.graph_signature
    (output,) = graph.find_nodes(op="output")
    found = dict(zip(stages, output.args[0][outputs:], strict=True))
    output.args = (tuple(output.args[0][:outputs]),)
    for stage, node in found.items():
        node._rename(stage_node(stage))
    specs = [dataclasses.replace(spec) for spec in signature.output_specs[:outputs]]
    for spec, node in zip(specs, output.args[0], strict=True):
        spec.arg.name = node.name
    entry = exported.module_call_graph[0]
    assert entry.signature is not None
    entry.signature.outputs = entry.signature.outputs[:outputs]
    entry.signature.out_spec = _pytree.tree_structure((0,) * outputs)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(signature.input_specs, specs),
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def stage_node(stage: str) -> str:
    """The name of a stage's value in the graph of a `.pt2`."""
    return STAGE + stage.replace(" ", "_")


def write_pt2(exported: ExportedProgram, file: Path) -> None:
    """Write a program of torch.export."""
    torch.export.save(exported, file)


def write_aoti(exported: ExportedProgram, file: Path) -> None:
    """Compile a program for this machine's processor or GPU, and write it with its weights."""
    torch._inductor.aoti_compile_and_package(exported, package_path=str(file))


class TorchRunner:
    """Runs programs of torch.export, or those that AOTInductor compiled."""

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device):
        self._manifest, self._device = manifest, device
        files = {name: below(folder, program.file) for name, program in manifest.programs.items()}
        self._programs: dict[str, Any]
        if manifest.to == "aoti":
            self._programs = {name: torch._inductor.aoti_load_package(str(file)) for name, file in files.items()}
            return
        self._exported = {name: torch.export.load(file) for name, file in files.items()}
        self._programs = {name: exported.module() for name, exported in self._exported.items()}

    @torch.no_grad()
    def run(self, program: str, inputs: dict[str, np.ndarray], stages: bool = False) -> dict[str, np.ndarray]:
        """The outputs of a program, each of its shape [...]; with `stages` those, by its graph, a node at a time."""
        found = self._manifest.programs[program]
        arguments = tuple(torch.from_numpy(np.array(inputs[x.name])).to(self._device) for x in found.program.inputs)
        outputs = self._programs[program](*arguments)
        results = {x.name: to_numpy(value) for x, value in zip(found.program.outputs, outputs, strict=True)}
        if stages and found.stages:
            exported = self._exported[program]
            kept = Kept(exported.graph_module, {stage_node(stage): stage for stage in found.stages})
            kept.run(*exported._graph_module_flat_inputs(arguments, {}))
            results |= {stage: to_numpy(at_least_float32(value)) for stage, value in kept.values.items()}
        return results


class Kept(torch.fx.Interpreter):
    """Runs a graph, and keeps the values of some nodes, by the names that are given to these."""

    def __init__(self, module: torch.fx.GraphModule, names: Mapping[str, str]):
        super().__init__(module)
        self._names, self.values = names, dict[str, torch.Tensor]()

    def run_node(self, n: torch.fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        if n.name in self._names:
            self.values[self._names[n.name]] = value
        return value
