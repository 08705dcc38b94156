"""Start a run in JAX, for the command `pi0-train`."""

from __future__ import annotations

import argparse
import os

import jax

from pi0.run_config import RunConfig
from pi0.storage import as_path
from pi0_jax.sampler import use_compilation_cache
from pi0_jax.training.sharding import start_processes
from pi0_jax.training.train import train


def run(config: RunConfig, args: argparse.Namespace) -> None:
    """Train as the arguments of `pi0-train` say."""
    keep_compiled(args.compilation_cache)
    start_processes(args.coordinator, args.process_count, args.process_index)
    train(config, args.workdir, profile=args.profile, overwrite=args.overwrite)


def keep_compiled(folder: str | None) -> None:
    """Keep compiled programs in `folder` ("none": nowhere; None: a folder of this user, or what JAX is told to).

    A run that is started again then compiles nothing. Raises ValueError for an address that is no bucket's.
    """
    if folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if where := folder or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(as_path(where)))
    use_compilation_cache()
