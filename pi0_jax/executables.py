"""Compiled programs that outlive the process: a restart loads them instead of compiling.

They are native code for one kind of machine, and are read with pickle: load only what you wrote yourself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from pi0.fetch import cache_dir

PACKAGES = (Path(__file__).parent, Path(__file__).parents[1] / "pi0")


class Executables:
    """Programs by name and the shapes of their arguments: in `folder` where given, else compiled.

    A program is stored under a hash of all that made it: `about`, its arguments' shapes and dtypes, this project's
    sources, JAX's version and settings, and the device. Another hash is another program, so none is ever stale.
    Programs that are not stored go to JAX's persistent compilation cache, which is set up here where there is none.
    """

    def __init__(self, folder: Path | None, about: str):
        self.folder, self.compiled = folder, 0
        self._about = "\n".join([about, _environment(), _sources()])
        if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 -- of settings mypy knows none
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))

    def get(self, name: str, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """The program `function(*arguments)`, of arrays in dicts, lists and tuples; made if there is none."""
        leaves, tree = jax.tree.flatten(arguments)
        key = f"{name} {tree} {[(x.shape, str(x.dtype)) for x in leaves]}"
        digest = hashlib.sha256(f"{self._about}\n{key}".encode()).hexdigest()
        file = None if self.folder is None else self.folder / f"{name}-{digest[:32]}.bin"
        if file is not None and file.exists():
            check, payload = file.read_bytes()[:32], file.read_bytes()[32:]
            if hashlib.sha256(payload).digest() == check:  # else it is damaged, and is written anew
                program, inputs, outputs = pickle.loads(payload)
                return serialize_executable.deserialize_and_load(
                    program, inputs, outputs, execution_devices=jax.devices()[:1]
                )
        with contextlib.nullcontext() if file is None else _without_cache():
            compiled = jax.jit(function).lower(*arguments).compile()
        self.compiled += 1
        if file is not None:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_bytes(hashlib.sha256(payload).digest() + payload)
            partial.replace(file)
        return compiled


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """No persistent compilation cache: on a CPU, what came out of it lacks its functions when it is stored again."""
    enabled = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which remembers whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _environment() -> str:
    """What JAX compiles for and how: versions, device, settings."""
    device = jax.devices()[0]
    host = _host_processor() if device.platform == "cpu" else ""
    settings = {n: getattr(jax.config, n) for n in ("jax_default_matmul_precision", "jax_enable_x64")}
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    versions = jax.__version__, jaxlib.__version__, device.client.platform_version
    return f"{versions} {device.platform} {device.device_kind} {host} {settings} {flags}"


def _host_processor() -> str:
    """What the host's instructions are: its features, or its name where the system does not list them."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _sources() -> str:
    """A hash of this project's sources that a program can depend on."""
    files = sorted(file for package in PACKAGES for file in package.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
