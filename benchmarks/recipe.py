"""Both stages of π0.5's recipe on the bundled recordings, compared with the second stage alone.

    python benchmarks/recipe.py --workdir runs/recipe

Three runs of the experiments `pi05_pretrain:demo` and `pi05_posttrain:demo` on 12 episodes, evaluated on the four that
are held out. About 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pi0.command import local_output_path
from pi0.experiments import read_config
from pi0_eval.scores import evaluate, table
from pi0_jax.training.train import train

THRESHOLD = 0.1


def run(stage: str, folder: Path, base: Path | None, steps: int) -> str:
    """Train one stage; returns each part of its loss in the first and in the last window, as text."""
    options = {
        "base_checkpoint": base or "",
        "steps": steps,
        "batch_size": 16,
        "log_every": 20,
        "eval_every": steps,
        "save_every": steps,
    }
    config = read_config(f"pi05_{stage}:demo", [f"--config.{name}={value}" for name, value in options.items()])
    train(config, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = ([row for row in rows if "loss" in row][i] for i in (0, -1))
    parts = [name for name in first if name == "loss" or name.endswith("_loss")]
    return ", ".join(f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in sorted(parts))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare π0.5's two stages with the second one alone.")
    parser.add_argument("--workdir", type=local_output_path, required=True)
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--posttrain-steps", type=int, default=250)
    args = parser.parse_args(arguments)
    pretrain = args.workdir / "pretrain"
    lines = [f"pretrain: {run('pretrain', pretrain, None, args.pretrain_steps)}"]
    for name, base in (("both stages", pretrain), ("the second alone", None)):
        folder = args.workdir / name.replace(" ", "_")
        lines.append(f"{name}: {run('posttrain', folder, base, args.posttrain_steps)}")
        lines.append(table(evaluate(folder, threshold=THRESHOLD), THRESHOLD))
    print("\n\n".join(["", *lines]))


if __name__ == "__main__":
    main()
