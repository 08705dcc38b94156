"""Start a run in PyTorch, for the command `pi0-train`."""

from __future__ import annotations

import argparse

from pi0.run_config import RunConfig
from pi0_torch.training.sharding import start_processes
from pi0_torch.training.train import train


def run(config: RunConfig, args: argparse.Namespace) -> None:
    """Train as the arguments of `pi0-train` say."""
    device = start_processes(args.coordinator, args.process_count, args.process_index, args.device)
    train(config, args.workdir, profile=args.profile, overwrite=args.overwrite, device=device, compile=args.compile)
