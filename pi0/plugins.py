"""What users add in packages of their own, named as "module:Name"; and what only some installations have."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any


class MissingExtraError(ImportError):
    """A package is missing that only some purposes need; the message names the extra to install."""


def require_extra(extra: str, *modules: str) -> None:
    """Raise MissingExtraError unless all of the modules, which the extra of this name brings, are installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"this needs {' and '.join(missing)}: pip install 'pi0[{extra}]'")


def resolve(name: Any, known: Mapping[str, Any], what: str, *, imports: bool = True) -> Any:
    """The object of this name: one of `known`, or "module:Name" of another package.

    `what` says what is looked for. Without `imports`, for names that come with a checkpoint, the module must have been
    imported already: a file must not decide what code runs. Raises ValueError.
    """
    if isinstance(name, str) and name in known:
        return known[name]
    module, separator, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (separator and module and attribute):
        raise ValueError(
            f'unknown {what} {name!r}; known are {", ".join(known)}, and "module:Name" of your own package'
        )
    if not imports and module not in sys.modules:
        raise ValueError(f"the {what} {name!r} is code of the package {module!r}: import it first, or pass it by name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the {what} {name!r} cannot be imported: {error}") from error
