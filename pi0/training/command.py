"""The command `pi0-train`. It imports a framework after its arguments are parsed."""

from __future__ import annotations

import importlib
import importlib.util
import logging

from pi0.command import exit_on_error, make_parser, output_path
from pi0.experiments import parse_arguments
from pi0.plugins import require_extra
from pi0.training.preemption import Preempted

# What starts a run, given its config and the arguments; floors below the frameworks know them by name only.
TRAINERS = {"jax": "pi0_jax.training.command", "torch": "pi0_torch.training.command"}
JAX_ONLY, TORCH_ONLY = ("compilation_cache",), ("compile", "device")

EXAMPLES = """examples:
  pi0-train --config metaworld_demo --workdir runs/metaworld
  pi0-train --config metaworld_demo:demo_pi05 --workdir runs/pi05 --config.steps=1000
  pi0-train --config pi0_metaworld --config.mesh.fsdp=8 --workdir runs/pi0_metaworld
  pi0-train --config my_experiments/towels.py --config.model.action_horizon=20 --workdir runs/towels
  pi0-train --config my_lab.experiments:get_towels --workdir runs/towels
  pi0-train --config pi0_metaworld --workdir gs://bucket/runs/pi0 --compilation-cache gs://bucket/compiled
  torchrun --nproc-per-node 8 -m pi0.training.command --framework torch --config pi0_libero --workdir runs/libero

files of a run's folder:
  config.json, metrics.jsonl, tensorboard/, images/, checkpoints/<step>"""


@exit_on_error("pi0-train", FloatingPointError, Preempted)
def main(arguments: list[str] | None = None) -> None:
    """The command `pi0-train`. Raises ValueError for options of the other framework."""
    description = (
        "Train the model of an experiment, in JAX or in PyTorch. --config.FIELD=VALUE overrides any field of its "
        "config (pi0/run_config.py). A run resumes from the newest checkpoint in its folder."
    )
    parser = make_parser("pi0-train", description, EXAMPLES)
    parser.add_argument("--workdir", required=True, type=output_path, help="the run's folder, gs:// too")
    parser.add_argument("--framework", choices=TRAINERS, help="default: jax where it is installed, else torch")
    processes = parser.add_argument_group(
        "several processes", "detected on TPU pods, GKE, SLURM and by torchrun; else give all"
    )
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
        help="of JAX: where compiled programs are kept, gs:// too, or none (default: $JAX_COMPILATION_CACHE_DIR, or "
        "the user's cache)",
    )
    parser.add_argument("--compile", action="store_true", help="of PyTorch: compile the step (torch.compile)")
    parser.add_argument("--device", metavar="DEVICE", help="of PyTorch: cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--profile", action="store_true", help="trace a few steps, for TensorBoard or Perfetto")
    args, config = parse_arguments(parser, arguments)
    logging.getLogger("absl").setLevel(logging.WARNING)

    framework = args.framework or ("jax" if _is_installed("jax") else "torch")
    require_extra(framework, framework)
    for name in TORCH_ONLY if framework == "jax" else JAX_ONLY:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is not of --framework {framework}")
    importlib.import_module(TRAINERS[framework]).run(config, args)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


if __name__ == "__main__":
    main()
