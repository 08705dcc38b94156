"""What all commands share: the entry point, `pi0 --help`, parsers, exit codes, and arguments that several take."""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from pi0 import __version__
from pi0.plugins import missing_extra
from pi0.storage import as_path, local_path

COMMANDS = {
    "train": "train a model in JAX or PyTorch, as an experiment's config says",
    "plan": "estimate memory and time of a training step on chips that need not be there",
    "convert": "convert a checkpoint to another layout",
    "inspect": "describe a checkpoint without reading its weights",
    "export": "export a sampler to torch.export, AOTInductor, ONNX or StableHLO, compared with its source",
    "parity": "compare two checkpoints stage by stage, in either framework",
    "eval-offline": "score a policy's subtasks, tokens and actions on recorded episodes",
    "replay": "compare a policy's actions with recorded ones, open loop",
    "rollout": "measure success rates of a policy in simulation, closed loop",
    "doctor": "find out why a policy does not move the robot as it should",
    "collect": "record demonstrations of a scripted expert in simulation",
    "serve": "serve a policy to robots, over openpi's websocket protocol",
    "quantize-report": "measure what quantized weights do to actions, layer by layer",
    "bench": "measure sampling against the machine's roofline",
    "demo": "train, convert, compare and replay on bundled recordings",
    "check-data": "find damaged files, episodes and frames of a dataset",
    "cache": "decode a dataset's images once, for training",
    "stats": "compute a dataset's norm stats",
    "fit-fast": "fit a FAST action tokenizer on a dataset",
}
INTERRUPTED = 130


def exit_on_error(prog: str, *errors: type[Exception], code: int = 1) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a command: what is wrong with its input ends it with one line and an exit code, not a traceback.

    `errors` are raised beside ValueError, OSError and the ImportError of a package that an extra installs; one with an
    attribute `exit_code` says its own.
    """

    caught: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *errors)

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except KeyboardInterrupt:
                print(f"{prog}: interrupted", file=sys.stderr)
                sys.exit(INTERRUPTED)
            except caught as error:
                message = missing_extra(error) if isinstance(error, ImportError) else error
                if message is None:
                    raise
                print(f"{prog}: {message}", file=sys.stderr)
                sys.exit(getattr(error, "exit_code", code))

        return run

    return decorate


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that names an unknown argument before a missing one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does. Raises ValueError for an unknown argument."""
        args = list(sys.argv[1:] if args is None else args)
        known = [option for option in self._option_string_actions if option.startswith("--")]
        fields = " and --config.FIELD=VALUE" if "--config" in known else ""
        for argument in args[: args.index("--")] if "--" in args else args:
            option = argument.partition("=")[0]
            if not re.match(r"--?[A-Za-z]", option) or (fields and option.startswith("--config.")):
                continue
            if option != "-h" and not any(name.startswith(option) for name in known):
                raise ValueError(f"unknown argument {argument}; known are {', '.join(known)}{fields}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and the message on one line."""
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help explains them all\n")


def make_parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A command's parser; the epilog keeps its lines."""
    formatter = argparse.RawDescriptionHelpFormatter
    text = textwrap.fill(description, 100)
    parser = Parser(prog=prog, description=text, epilog=epilog, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    return parser


def output_path(text: str) -> Path:
    """The type of an argument that names a file or folder to write, of this machine or in a bucket.

    Raises ArgumentTypeError for an address that cannot be written.
    """
    try:
        return as_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_output_path(text: str) -> Path:
    """The type of an argument that names a file or folder of this machine to write.

    Raises ArgumentTypeError for an address.
    """
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def robot_reference(text: str) -> Any:
    """The type of `--robot`: a name, or a JSON object of a name and options.

    Raises ArgumentTypeError for what is no JSON.
    """
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from error


def add_robot(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The argument `--robot`."""
    text = 'a name, "module:Name", or JSON {"name": …, options}'
    needed = "the robot: " if required else "the robot, where the checkpoint does not name it: "
    parser.add_argument("--robot", type=robot_reference, required=required, help=needed + text)


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """The arguments `dataset` and `--format`."""
    parser.add_argument("dataset", help="a folder, hf://datasets/…, gs://… or bundled://…")
    parser.add_argument(
        "--format", default="lerobot", help='of the dataset: lerobot (default), rlds, arrayrecord or "module:Name"'
    )


def add_checkpoint(parser: argparse.ArgumentParser, name: str = "checkpoint") -> None:
    """The arguments `checkpoint` (or `name`) and `--asset-id`."""
    parser.add_argument(name, help="the folder of a checkpoint or of a training run, gs:// or hf://")
    parser.add_argument("--asset-id", metavar="ID", help="of several norm stats: those of this robot or dataset")


def add_preset(parser: argparse.ArgumentParser) -> None:
    """The argument `--preset`."""
    text = "the openpi config that the checkpoint was trained with, such as pi05_droid: says horizon, cameras, robot, …"
    parser.add_argument("--preset", metavar="NAME", help=text)


def add_head_dims(parser: argparse.ArgumentParser) -> None:
    """The argument `--head-dims`."""
    parser.add_argument(
        "--head-dims",
        type=_head_dims,
        metavar="LANGUAGE,VISION",
        help="head dims of the language model and the vision tower, where no file says them: layouts with flat heads "
        "do not distinguish them from the number of heads (released models: 256,72)",
    )


def _head_dims(text: str) -> tuple[int, int]:
    """Two whole numbers. Raises ValueError, which argparse reports."""
    language, vision = (int(part) for part in text.split(","))
    return language, vision


def main() -> None:
    """The entry point of every command: `pi0 NAME …`, and `pi0-NAME …`."""
    try:
        _run_command()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        # Interpreters whose JAX was interrupted while it compiled crash when they are finalized.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(INTERRUPTED)


@exit_on_error("pi0")
def _run_command() -> None:
    name = Path(sys.argv[0]).name.removesuffix(".exe").removeprefix("pi0").removeprefix("-")
    arguments = sys.argv[1:]
    if not name:
        listed = "\n".join(f"  pi0 {command:<17}{text}" for command, text in COMMANDS.items())
        parser = make_parser("pi0", "π0, π0.5 and π0-FAST robot policies in JAX and PyTorch.", f"commands:\n{listed}")
        parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="pi0 COMMAND --help explains it")
        name, arguments = parser.parse_args(arguments[:1]).command, arguments[1:]
    load_command(name)(arguments)


def load_command(name: str) -> Callable[[list[str]], None]:
    """A command's function, of the entry points `pi0.commands`."""
    (found,) = entry_points(group="pi0.commands", name=name)
    return exit_on_error(f"pi0-{name}")(found.load)()
