"""What runs an export of any format: onnxruntime, PyTorch or JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi0.policy.exported import ExportedPolicy, OnnxRunner, Runner
from pi0.policy.manifest import ExportError, Manifest


def open_runner(folder: Path, manifest: Manifest, device: str | None = None) -> Runner:
    """The runner of an export. Raises ValueError for a `device` that is not available, or that the format ignores."""
    if device is not None and manifest.to not in ("pt2", "aoti"):
        raise ValueError(f"device is {device!r}: it is of exports to pt2 and aoti, not to {manifest.to}")
    if manifest.to == "onnx":
        return OnnxRunner(folder, manifest)
    if manifest.to == "stablehlo":
        from pi0_jax.export import StableHLORunner

        return StableHLORunner(folder, manifest)
    from pi0_torch.export.pt2 import TorchRunner
    from pi0_torch.loading import find_device

    return TorchRunner(folder, manifest, find_device(device or "cpu"))


def load_exported(path: str | Path, to: str | None = None, device: str | None = None, **options: Any) -> ExportedPolicy:
    """The policy of an export of any format; `options` as in `ExportedPolicy.from_export`.

    Raises ExportError for an export to another format than `to`, where that is given.
    """
    folder = Path(path).expanduser()
    manifest = Manifest.load(folder)
    require_format(manifest, path, to)
    return ExportedPolicy.from_export(folder, verify=False, runner=open_runner(folder, manifest, device), **options)


def require_format(manifest: Manifest, path: str | Path, to: str | None) -> None:
    """Raise ExportError for an export to another format than `to`, where that is given."""
    if to not in (None, manifest.to):
        raise ExportError(f"{path} is an export to {manifest.to}, not to {to}")
