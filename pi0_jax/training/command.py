"""The command `pi0-train`. It imports JAX after its arguments are parsed."""

from __future__ import annotations

import logging
import os

from pi0.command import exit_on_error, make_parser, output_path
from pi0.experiments import parse_arguments
from pi0.storage import as_path
from pi0_jax.training.preemption import Preempted

EXAMPLES = """examples:
  pi0-train --config metaworld_demo --workdir runs/metaworld
  pi0-train --config metaworld_demo:demo_pi05 --workdir runs/pi05 --config.steps=1000
  pi0-train --config pi0_metaworld --config.mesh.fsdp=8 --workdir runs/pi0_metaworld
  pi0-train --config my_experiments/towels.py --config.model.action_horizon=20 --workdir runs/towels
  pi0-train --config my_lab.experiments:get_towels --workdir runs/towels
  pi0-train --config pi0_metaworld --workdir gs://bucket/runs/pi0 --compilation-cache gs://bucket/compiled

files of a run's folder:
  config.json, metrics.jsonl, tensorboard/, images/, checkpoints/<step>/{params,train_state,assets}"""


@exit_on_error("pi0-train", FloatingPointError, Preempted)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-train`."""
    description = (
        "Train the model of an experiment. --config.FIELD=VALUE overrides any field of its config "
        "(pi0/run_config.py). A run resumes from the newest checkpoint in its folder."
    )
    parser = make_parser("pi0-train", description, EXAMPLES)
    parser.add_argument("--workdir", required=True, type=output_path, help="the run's folder, gs:// too")
    processes = parser.add_argument_group("several processes", "detected on TPU pods, GKE and SLURM; else give all")
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="the address of process 0")
    processes.add_argument("--process-count", type=int, metavar="N", help="the number of processes")
    processes.add_argument("--process-index", type=int, metavar="I", help="the number of this process, from 0")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run in the folder, once this one has a checkpoint",
    )
    parser.add_argument(
        "--compilation-cache",
        metavar="FOLDER",
        help="where compiled programs are kept, gs:// too, or none (default: $JAX_COMPILATION_CACHE_DIR, or the "
        "user's cache)",
    )
    parser.add_argument("--profile", action="store_true", help="trace a few steps, for TensorBoard or Perfetto")
    args, config = parse_arguments(parser, arguments)
    logging.getLogger("absl").setLevel(logging.WARNING)

    from pi0_jax.training.sharding import start_processes
    from pi0_jax.training.train import train

    keep_compiled(args.compilation_cache)
    start_processes(args.coordinator, args.process_count, args.process_index)
    train(config, args.workdir, profile=args.profile, overwrite=args.overwrite)


def keep_compiled(folder: str | None) -> None:
    """Keep compiled programs in `folder` ("none": nowhere; None: a folder of this user, or what JAX is told to).

    A run that is started again then compiles nothing. Raises ValueError for an address that is no bucket's.
    """
    import jax

    from pi0_jax.sampler import use_compilation_cache

    if folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if where := folder or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(as_path(where)))
    use_compilation_cache()
