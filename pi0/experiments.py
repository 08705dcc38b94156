"""Experiments by name, file or module, and their run configs with overrides from the command line."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from pi0.config import ConfigError, options_of
from pi0.plugins import resolve
from pi0.run_config import RunConfig

HELP = 'an experiment of the package `configs`, FILE.py, or "module:function"; ARG is passed to it'


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, RunConfig]:
    """A command's arguments and the config that its `--config` and `--config.FIELD=VALUE` give. Raises ConfigError."""
    parser.add_argument("--config", required=True, metavar="NAME[:ARG]", help=HELP)
    args, rest = parser.parse_known_args(arguments)
    return args, read_config(args.config, rest)


def read_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the experiment `name`, with overrides `--config.FIELD=VALUE`. Raises ConfigError.

    FIELD is dotted. VALUE is read by the type of the field: a string as it is, all else as Python or JSON writes it.
    """
    values = find_experiment(name)().to_dict()
    for field, text in _assignments(overrides):
        _assign(values, RunConfig, field.split("."), text)
    return RunConfig.from_dict(values)


def experiments() -> list[str]:
    """The names of the experiments of the package `configs`."""
    return [m.name for m in pkgutil.iter_modules(importlib.import_module("configs").__path__) if m.name[0] != "_"]


def find_experiment(name: str) -> Callable[[], Any]:
    """The function `get_config` of an experiment, with its argument bound: what returns its config.

    `name` is NAME of the package `configs`, FILE.py or "module:function", each with `:ARG` where it takes an argument.
    Raises ConfigError for an unknown one, OSError for a missing file.
    """
    first, _, rest = name.partition(":")
    if file := re.fullmatch(r"(.*\.py)(?::(.*))?", name):
        get_config, argument = _load(Path(file[1])), file[2]
    elif first in experiments():
        get_config, argument = _get_config(importlib.import_module(f"configs.{first}")), rest
    else:
        function, _, argument = rest.partition(":")
        hint = f'experiments are {", ".join(experiments())}, FILE.py, and "module:function" of your own package'
        if not function:
            raise ConfigError(f"unknown experiment {name!r}; {hint}")
        try:
            get_config = resolve(f"{first}:{function}", {}, "experiment")
        except ValueError as error:
            raise ConfigError(f"{error}; {hint}") from error
    if not argument:
        return get_config
    if not inspect.signature(get_config).parameters:
        raise ConfigError(f"the experiment {name.removesuffix(f':{argument}')} takes no argument; it got {argument!r}")
    return lambda: get_config(argument)


def _load(file: Path) -> Callable[..., Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no experiment file {file}; experiments by name are {', '.join(experiments())}"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, "a Python file has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _get_config(module)


def _get_config(module: Any) -> Callable[..., Any]:
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{module.__file__} is no experiment: it has no function get_config")
    return module.get_config


def _assignments(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Dotted fields and texts of `--config.FIELD=VALUE` and `--config.FIELD VALUE`; without a value it is true."""
    rest = list(overrides)
    while rest:
        argument = rest.pop(0)
        field, equals, text = argument.partition("=")
        if not re.fullmatch(r"--config(\.\w+)+", field):
            raise ConfigError(f"unknown argument {argument}; a field of the config is set by --config.FIELD=VALUE")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        yield field.removeprefix("--config."), text


def _assign(table: dict[str, Any], hint: Any, path: list[str], text: str) -> None:
    """Set a field of a table of the type `hint`; `RunConfig.from_dict` refuses unknown ones later."""
    (field, *rest), cls = path, next(filter(dataclasses.is_dataclass, options_of(hint)), None)
    hint = Any if cls is None else typing.get_type_hints(cls).get(field, Any)
    if not rest:
        table[field] = _parse(text, hint)
        return
    if table.get(field) is None:
        table[field] = {}
    if not isinstance(table[field], dict):
        raise ConfigError(f"{field} is {table[field]!r}; it has no field {rest[0]!r}")
    _assign(table[field], hint, rest, text)


def _parse(text: str, hint: Any) -> Any:
    options = options_of(hint)
    if options == (str,):
        return text
    for read in (ast.literal_eval, json.loads):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            value = read(text)
            return text if str in options and not isinstance(value, Mapping | NoneType) else value
    return text
