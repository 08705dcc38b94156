"""Sampling, loss with gradients, and data loading beside LeRobot and openpi, in one run.

tests/peers/make_env.sh                                    LeRobot in .cache/peers
python benchmarks/peers.py                                 58 M parameters, 3 cameras, float32
python benchmarks/peers.py --openpi CHECKOUT --openpi-python VENV/bin/python
python benchmarks/peers.py --tasks sample --quantize int8 w8a8 --exports onnx aoti       these beside all others

Every side is a process of its own with a model of the same sizes and random weights; after all have warmed up, they
take turns, one call each a round, so that what else the machine does falls on all alike. A ratio is the median of the
rounds' ratios: how many times our time, at our best setting in that framework, the other side's is. openpi's JAX
recomputes each layer in the backward pass and has no option not to; its row "without remat" has that replaced. openpi's
environment needs its pinned packages and, for its PyTorch, its patched transformers.

For data, LeRobot's loader reads shuffled batches of a recording in worker processes, at the recorded size; ours does
that and all transforms of training (resizing, normalization, tokens; neither augments), from the videos, from a frame
cache, and from ArrayRecord on this machine and in a bucket: a server of Google Cloud Storage's interface on 127.0.0.1
(fake-gcs-server), which takes its part of the same processors; CPU time is that of a side's processes without it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.fresh import with_fresh
from convert.layouts.registry import LAYOUTS
from pi0.assets import Assets
from pi0.config import ModelConfig
from pi0.fetch import fetch
from pi0.variants import get_variant

HERE = Path(__file__).parent
REPLY = "@"


@dataclasses.dataclass
class Side:
    """A process that times one call at a time; without `process` where it could not start."""

    name: str
    framework: str
    job: dict[str, Any]
    command: list[str]
    path: str = ""
    ours: bool = False
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)  # seconds, of data
    process: subprocess.Popen[str] | None = None

    def start(self, log: Path) -> None:
        """Start and warm up. Prints why, where that fails."""
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        clean |= {"PYTHONPATH": self.path, "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            pipe = subprocess.PIPE
            command = [*self.command, json.dumps(self.job)]
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=clean)
        if self._reply() != "ready":
            last = (log.read_text().strip().splitlines() or ["it ended"])[-1]
            print(f"{self.name} is left out: {last[:300]}", flush=True)
            self.process = None

    def time(self) -> None:
        """Time one call."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, *cpu = map(float, self._reply().split())
        self.seconds.append(seconds)
        self.cpu += cpu

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _reply(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(REPLY):
                return line[len(REPLY) :].strip()
        return ""


def sides_of(task: str, job: dict[str, Any], args: argparse.Namespace) -> list[Side]:
    """All that there are, at each of their settings."""
    ours, root = [sys.executable, str(HERE / "sides" / "time_ours.py")], str(HERE.parent)
    sides = []
    if task == "data":
        records = {"root": args.records, "format": "arrayrecord"}
        for name, more in (
            ("ours, from the videos", {}),
            ("ours, from a frame cache", {"cache": args.cache}),
            ("ours, from ArrayRecord", records),
            ("ours, from ArrayRecord in a bucket", records | {"root": args.bucket}),
        ):
            sides.append(Side(name, "", job | more, ours, root, ours=True))
    else:
        sides.append(Side("ours", "JAX", job | {"framework": "jax"}, ours, root, ours=True))
        for mode in args.modes:
            more = {"framework": "torch", "compile": mode == "compiled"}
            sides.append(Side(f"ours, {mode}", "PyTorch", job | more, ours, root, ours=True))
            for format in args.quantize if task == "sample" else ():  # other numbers: never our best, for a ratio
                sides.append(Side(f"ours, {format}, {mode}", "PyTorch", job | more | {"quantize": format}, ours, root))
    if task == "sample":
        for format, folder in args.exported.items():
            more = {"framework": "export", "folder": str(folder)}
            sides.append(Side(format, "export", job | more, ours, root))
    if args.lerobot is not None:
        python = [str(args.lerobot / "bin" / "python"), "-W", "ignore", str(HERE / "sides" / "time_lerobot.py")]
        if task == "data":
            sides += [
                Side(f"LeRobot, {backend}", "", job | {"video_backend": backend}, python) for backend in args.video
            ]
        else:
            sides += [
                Side(f"LeRobot, {mode}", "PyTorch", job | {"compile": mode == "compiled"}, python)
                for mode in args.modes
            ]
    if args.openpi is not None and task != "data":  # its data loader is LeRobot's
        python = [str(args.openpi_python), "-W", "ignore", str(HERE / "sides" / "time_openpi.py")]
        path = os.pathsep.join(str(args.openpi / part) for part in ("src", "packages/openpi-client/src"))
        for name, remat in (("openpi", True), ("openpi, without remat", False)):
            if remat or task == "gradients":
                sides.append(Side(name, "JAX", job | {"framework": "jax", "remat": remat}, python, path))
        for mode in args.modes:
            more = {"framework": "torch", "compile": mode == "compiled"}
            sides.append(Side(f"openpi, {mode}", "PyTorch", job | more, python, path))
    return sides


def compare(task: str, job: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a task's rows."""
    sides = sides_of(task, job, args)
    with tempfile.TemporaryDirectory(prefix="pi0-peers-") as logs:
        try:
            for i, side in enumerate(sides):
                side.start(Path(logs) / f"{i}.log")
            running = [side for side in sides if side.process is not None]
            print(f"{len(running)} sides are warm; {args.rounds} rounds", file=sys.stderr, flush=True)
            for _ in range(args.rounds):
                for side in running:
                    side.time()
        finally:
            for side in sides:
                side.stop()
    for side in running:
        cells = []
        for framework in ("JAX", "PyTorch") if task != "data" else ("",):
            best = min(
                (s for s in running if s.ours and s.framework == framework),
                key=lambda s: statistics.median(s.seconds),
                default=None,
            )
            pairs = zip(side.seconds, best.seconds, strict=True) if best else ()
            ratios = [theirs / own for theirs, own in pairs]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        label = f"{side.framework}, {side.name}".lstrip(", ")
        median, best_ms = 1e3 * statistics.median(side.seconds), 1e3 * min(side.seconds)
        if task == "data":
            samples = job["batches"] * job["batch"]
            rate, cpu_ms = samples / statistics.median(side.seconds), 1e3 * statistics.median(side.cpu) / samples
            workers = f"{task}, {job['workers']} worker{'s' if job['workers'] > 1 else ''}"
            print(
                f"| {workers} | {label} | {median:.0f} | {best_ms:.0f} | {rate:.0f}/s | {cpu_ms:.2f} | {cells[0]} |",
                flush=True,
            )
        else:
            print(f"| {task} | {label} | {median:.1f} | {best_ms:.1f} | {cells[0]} | {cells[1]} |", flush=True)


def export_random(config: ModelConfig, formats: list[str], folder: Path) -> dict[str, Path]:
    """Folders of exports of a random model, by format. Prints what could not be exported, and why."""
    if not formats:
        return {}
    source = folder / "random"
    source.mkdir()
    ours, _ = with_fresh(config, {}, seed=0)
    write_checkpoint(Checkpoint(source, LAYOUTS["pi0_torch"], Assets(config), ours), source, "pi0_torch")
    found = {}
    for format in formats:
        command = [sys.executable, "-c", "from pi0_eval.export.command import main; main()"]
        command += [str(source), str(folder / format), "--to", format, "--cases", "1"]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            print(f"the export to {format} is left out: {last[:300]}", flush=True)
        else:
            found[format] = folder / format
    return found


def prepare_records(dataset: Path, args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Fill the frame cache, and write the recordings as ArrayRecord: to a folder, and a bucket that stays till the end.

    Prints what they take.
    """
    sys.path.append(str(HERE.parent))
    from pi0.datasets.cache import main as cache
    from pi0.storage import as_path, list_files, upload

    bucket = importlib.import_module("tests.bucket")

    folder = dataset.parent
    args.records, args.bucket = str(folder / "records"), f"gs://{bucket.NAME}/records"
    size = ["--size", f"{args.size}x{args.size}", "--workers", "2"]
    cache([str(dataset), *size, "--cache", args.cache])
    cache([str(dataset), *size, "--to", "arrayrecord", "--out", args.records])
    proxy = stack.enter_context(bucket.server())
    os.environ |= {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{proxy.upstream}",  # not through the tests' proxy, which is slow
        "PI0_CACHE": str(folder / "fetched"),
    }
    upload(Path(args.records), as_path(args.bucket))
    for name, where in (("videos", dataset), ("frame cache", Path(args.cache)), ("ArrayRecord", Path(args.records))):
        print(f"{name}: {sum(file.size for file in list_files(where).values()):,} bytes", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("sample", "gradients", "data"), default=None)
    parser.add_argument("--model", default="bench", help="variant of pi0.variants, π0 or π0.5 (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of the images, a multiple of 14 (default %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="of gradients; sampling has 1 (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--quantize", nargs="+", default=[], metavar="FORMAT", help="of sampling: ours in these, too")
    text = "of sampling: exports of ours, such as onnx and aoti (pi0-export), too"
    parser.add_argument("--exports", nargs="+", default=[], metavar="FORMAT", help=text)
    parser.add_argument("--lerobot", type=Path, default=Path(".cache/peers"), help="its environment's folder")
    parser.add_argument("--openpi", type=Path, help="a checkout of openpi")
    parser.add_argument("--openpi-python", type=Path, default=Path("python"), help="of an environment for openpi")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of data: processes (default 1 and 2)")
    parser.add_argument("--batches", type=int, default=8, help="of data, in a call (default %(default)s)")
    parser.add_argument("--video", nargs="+", default=["pyav"], help="LeRobot's video backends (default pyav)")
    args = parser.parse_args()
    if not (args.lerobot / "bin" / "python").exists():
        print(f"LeRobot is left out: no environment in {args.lerobot}; tests/peers/make_env.sh makes it")
        args.lerobot = None
    if args.openpi is not None and args.size != 224:
        parser.error("openpi's images are 224 x 224: leave --openpi or --size out")
    config = get_variant(args.model, image_resolution=(args.size, args.size))
    data_job = {"batch": 32, "batches": args.batches, "robot": "metaworld"}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pi0-peers-"))
        args.cache = str(Path(folder) / "cache")
        dataset = Path(folder) / "dataset"
        shutil.copytree(fetch("bundled://metaworld_v30"), dataset)
        for task in args.tasks or ("sample", "gradients", "data"):
            if task == "data":
                print(
                    "| task | side | median ms | best ms | samples | CPU ms per sample | times ours |\n"
                    "|---|---|---|---|---|---|---|",
                    flush=True,
                )
                prepare_records(dataset, args, stack)
                job = {"task": task, "config": config.to_dict(), "dataset": str(dataset), **data_job}
                for workers in args.workers:
                    compare(task, job | {"workers": workers}, args)
            else:
                args.exported = export_random(config, args.exports if task == "sample" else [], Path(folder))
                print("| task | side | median ms | best ms | times our JAX | times our PyTorch |", flush=True)
                print("|---|---|---|---|---|---|", flush=True)
                job = {"task": task, "config": config.to_dict(), "batch": 1 if task == "sample" else args.batch}
                compare(task, job, args)


if __name__ == "__main__":
    main()
