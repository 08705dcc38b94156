"""The folder of an export (docs/export.md): its programs' files, and `manifest.json`, which describes them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pi0 import __version__
from pi0.config import ConfigError, from_dict
from pi0.policy.programs import AXES, DTYPES, Program, Sizes
from pi0.policy.rtc import RTC
from pi0.reading import read_json
from pi0.storage import below, digest, list_files, write_text

FORMAT = "pi0 export"
MANIFEST = "manifest.json"
FORMATS = ("pt2", "aoti", "onnx", "stablehlo")


class ExportError(ValueError):
    """An export that cannot be made or used; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class ProgramFile:
    """A program, the file that it is in, and the stages that can be read from it while it runs."""

    file: str
    program: Program
    stages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        to: the format, one of `FORMATS`.
        programs: by name, as in `pi0.policy.programs`.
        sizes: those of calls.
        num_steps: Euler steps, which are in the program; of π0-FAST the most tokens.
        room: how many tokens are written after the prompt at most.
        dtype: in which it computes. weights: in which its weights are stored.
        rtc: the real-time chunking that is in the program.
        subtasks: whether a subtask is written before the actions.
        quantization: the format of each layer that is quantized (`pi0.quantization`).
        source: the name and the checksum of the checkpoint that it was made of.
        versions: of the packages that it was made with.
        gate: how far from the source it was found: format, tolerance, cases, and the largest errors by stage.
        files: the SHA-256 of each file.
        version: of this package.
    """

    to: str
    programs: dict[str, ProgramFile]
    sizes: Sizes
    num_steps: int
    room: int
    dtype: str
    weights: str
    rtc: RTC | None = None
    subtasks: bool = False
    quantization: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)
    gate: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: str = __version__

    def save(self, folder: Path) -> None:
        """Write `manifest.json` with the checksums of all other files of the folder."""
        found = {n: digest(f.path, "sha256") for n, f in sorted(list_files(folder).items()) if n != MANIFEST}
        values = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(self, files=found))}
        write_text(folder / MANIFEST, json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, verify: bool = True) -> Manifest:
        """The manifest of an export's folder, whose files have the checksums in it, unless they are not to `verify`.

        Raises ExportError, and FileNotFoundError for a folder that is none.
        """
        path = folder / MANIFEST
        values = read_json(path, error=ExportError)
        if values.pop("format", None) != FORMAT:
            raise ExportError(f"{path} is no manifest of an export")
        _as_mapping(path, values, "programs")
        try:
            values["programs"] = {
                name: from_dict(ProgramFile, program, f"programs.{name}")
                for name, program in values["programs"].items()
            }
            manifest = from_dict(cls, values)
        except ConfigError as error:
            raise ExportError(f"{path}: {error}") from error
        manifest._check(path)
        if verify:
            manifest._verify(folder)
        return manifest

    def _check(self, path: Path) -> None:
        if self.to not in FORMATS:
            raise ExportError(f"{path}: to is {self.to!r}; it must be one of {', '.join(FORMATS)}")
        for name, program in self.programs.items():
            for x in (*program.program.inputs, *program.program.outputs):
                if x.dtype not in DTYPES or any(isinstance(n, str) and n not in AXES for n in x.shape):
                    raise ExportError(f"{path}: {name}.{x.name} is {x.dtype} {list(x.shape)}")
            if program.file not in self.files:
                raise ExportError(f"{path}: {program.file} of {name} is none of its files")

    def _verify(self, folder: Path) -> None:
        there = set(list_files(folder)) - {MANIFEST}
        if there != set(self.files):
            problem = f"it lacks {sorted(set(self.files) - there)} and has {sorted(there - set(self.files))} besides"
            raise ExportError(f"{folder} has other files than its manifest: {problem}; export it again")
        for name, checksum in self.files.items():
            if digest(below(folder, name), "sha256") != checksum:
                raise ExportError(f"{folder / name} is not the file that was exported (SHA-256); export it again")


def _as_mapping(path: Path, values: Mapping[str, Any], name: str) -> None:
    if not isinstance(values.get(name), Mapping):
        raise ExportError(f"{path} has no {name}")


def is_export(path: str | Path) -> bool:
    """Whether this is the folder of an export."""
    return "://" not in str(path) and (Path(path).expanduser() / MANIFEST).is_file()
