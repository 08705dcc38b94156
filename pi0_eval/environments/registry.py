"""Environments by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pi0.plugins import resolve
from pi0_eval.environments.environment import Environment

ENVIRONMENTS = {
    "aloha": "pi0_eval.environments.aloha:AlohaSim",
    "libero": "pi0_eval.environments.libero:Libero",
    "maniskill": "pi0_eval.environments.maniskill:ManiSkill",
    "metaworld": "pi0_eval.environments.metaworld:MetaWorld",
}


def find_environment(name: str) -> type[Environment]:
    """The class of an environment, one of ENVIRONMENTS or "module:Name". Raises ValueError, and MissingExtraError."""
    found = resolve(name, ENVIRONMENTS, "environment")
    if name in ENVIRONMENTS:
        found = resolve(found, {}, "environment")
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ValueError(f"the environment {name!r} must be a subclass of Environment; it is {found!r:.80}")
    return found


def find_tasks(reference: str | Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environments that a reference stands for: "metaworld/reach-v3", a suite such as "libero/libero_spatial".

    With options it is a dict, {"name": "metaworld/reach-v3", **options}, or JSON of one. Each is
    {"name": class, "task": task, **options}. Raises ValueError for an unknown one, or for unknown options.
    """
    if isinstance(reference, str) and reference.startswith("{"):
        try:
            reference = json.loads(reference)
        except ValueError as error:
            raise ValueError(f"{reference} is not JSON: {error}") from error
    options = {"name": reference} if isinstance(reference, str) else dict(reference)
    name, _, task = str(options.pop("name", "")).partition("/")
    found = find_environment(name)
    known = inspect.signature(found).parameters
    if unknown := sorted(options.keys() - (known.keys() - {"task"})):
        raise ValueError(f"environment {name!r} has no options {unknown}; it has {sorted(known.keys() - {'task'})}")
    return [{"name": name, "task": each, **options} for each in found.tasks(task)]


def make_environment(reference: Mapping[str, Any], cameras: Sequence[str] | None = None) -> Environment:
    """The environment of an entry of `find_tasks`, that renders these cameras (default: its own choice)."""
    options = dict(reference)
    name = options.pop("name")
    return find_environment(name)(**({"cameras": cameras} | options))


def task_name(reference: Mapping[str, Any]) -> str:
    """The name of an entry of `find_tasks` in tables and files."""
    return f"{reference['name']}/{reference['task']}" if reference["task"] else reference["name"]
