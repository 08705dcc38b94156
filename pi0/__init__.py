"""What both frameworks share: configs, observations, tokenizers, normalization, robots, datasets. NumPy only.

`Policy.from_export` runs an export to ONNX by onnxruntime, without PyTorch and JAX.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Policy"]


def __getattr__(name: str) -> Any:
    if name != "Policy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.policy.exported").ExportedPolicy
