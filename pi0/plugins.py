"""Extensions in other packages, named as "module:Name", and packages that only some installations have."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any


class MissingExtraError(ImportError):
    """An optional package is missing; the message names the extra to install."""


# The extra that installs a package, by the package's name.
EXTRAS = {
    **dict.fromkeys(("flax", "jax", "optax", "orbax"), "jax"),
    **dict.fromkeys(("absl", "grain", "ml_collections", "tensorboardX"), "train"),
    **dict.fromkeys(("av", "pyarrow", "array_record", "google_crc32c", "simplejpeg"), "data"),
    **dict.fromkeys(("msgpack", "websockets"), "client"),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client"), "serve"),
    **{"torch": "torch", "matplotlib": "plots", "wandb": "wandb", "ray": "ray", "rerun": "rerun"},
    **{"metaworld": "sim-metaworld", "libero": "sim-libero", "gym_aloha": "sim-aloha"},
    **{"mani_skill": "sim-maniskill", "sapien": "sim-maniskill"},
    **{"onnxruntime": "onnx", "onnx": "export", "onnxscript": "export"},
    **{"etils": "gcs", "gcsfs": "gcs", "s3fs": "s3"},
}


def missing_extra(error: ImportError) -> str | None:
    """What to install for a package that could not be imported, as a message; None where it is of no extra."""
    if isinstance(error, MissingExtraError):
        return str(error)
    package = (error.name or "").partition(".")[0]
    missing = isinstance(error, ModuleNotFoundError) and package in EXTRAS
    return f"this needs {package}: pip install 'pi0[{EXTRAS[package]}]'" if missing else None


def require_extra(extra: str, *modules: str) -> None:
    """Raise MissingExtraError unless all of the modules, which this extra installs, can be imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"this needs {' and '.join(missing)}: pip install 'pi0[{extra}]'")


def resolve(name: Any, known: Mapping[str, Any], what: str, *, imports: bool = True) -> Any:
    """The object of this name: one of `known`, or "module:Name" of another package.

    `what` names it in errors. Without `imports`, for names that come with a checkpoint, the module must have been
    imported already, and no code of it runs: a file must not decide what is executed. Raises ValueError.
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
        if not imports:
            return vars(sys.modules[module])[attribute]  # not getattr, which may call the module's __getattr__
        return getattr(importlib.import_module(module), attribute)
    except MissingExtraError:
        raise
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the {what} {name!r} cannot be imported: {error}") from error
