"""Sampling and training of the released sizes on one GPU, in a table, within a given time.

benchmarks/gpu.sh                                                        on an H100 or H200, 9 minutes at most
benchmarks/gpu.sh --models tiny tiny_pi0_fast --dtype float32 --batch 1 2 --minutes 2 --train tiny   here, on a CPU

Every model has a process for each framework and for each format of its weights, which holds it and makes its programs;
all compile side by side, as many as the GPU's memory has room for. Then, one process at a time, they are measured as
pi0-bench does it, against the roofline. Training steps come last (benchmarks/training.py).

Cases are in the order of their importance: all cameras at batch 1 first, with its stages. What does not fit into the
time is left out from the end, and named. The formats are those of pi0.quantization, and PyTorch's alone: JAX computes
in the dtype. Weights are random; --out writes all numbers as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pi0.quantization import FORMATS, WIDE
from pi0.storage import write_text
from pi0.variants import get_variant
from pi0_eval.bench import Case, Report, Result, Runs, measure_runs, runs_of

REPLY = "@"  # before the lines meant for this program, since libraries print too
GIB = 16  # of the GPU's memory for a process: model and sampler in bfloat16, and the largest batch
PREPARE, TRAIN = 0.5, 0.25  # of the time: for compiling at most, and kept for training
TITLES = ("model", "side", "cameras", "batch", "ms, median", "p99", "vision", "prefix", "step", "roofline", "times it")


def worker(job: dict[str, Any]) -> None:
    """Make the programs of cases until the deadline; then, when told to, measure them one after the other."""
    made: list[tuple[int, Case, Runs]] = []
    slowest = 0.0
    for i, values in enumerate(job["cases"]):
        begin = time.time()
        if made and begin + slowest > job["deadline"]:
            break
        case = Case(**values)
        try:
            runs = runs_of(case)
            runs = runs if i == 0 else dataclasses.replace(runs, until={})  # stages are programs of their own
            for run in (runs.call, *runs.until.values()):
                for _ in range(3):  # CUDA graphs are recorded in the second call
                    run()
        except Exception as error:  # what one case cannot do must not end the others
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            tell(case=i, error=reason[:160])
            continue
        made.append((i, case, runs))
        slowest = max(slowest, time.time() - begin)
    tell(ready=len(made))
    sys.stdin.readline()
    for i, case, runs in made:
        tell(case=i, result=dataclasses.asdict(measure_runs(case, runs, first_ms=0.0)))
    tell(done=True)


def tell(**values: Any) -> None:
    """Say something to the program that started this process."""
    print(REPLY, json.dumps(values), flush=True)


class Worker:
    """A process of `worker` with the cases of one side: a model in a framework and a format of its weights."""

    def __init__(self, name: str, cases: list[Case]):
        self.name, self.cases = name, cases
        self.results: dict[int, Result] = {}
        self.errors: dict[int, str] = {}
        self.process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[dict[str, Any]] = queue.Queue()

    def start(self, deadline: float, log: Path) -> None:
        """Start to make programs, until a deadline in seconds since the epoch."""
        job = {"cases": [dataclasses.asdict(case) for case in self.cases], "deadline": deadline}
        command, pipe = [sys.executable, __file__, "--worker", json.dumps(job)], subprocess.PIPE
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, start_new_session=True
            )
        threading.Thread(target=self._read, args=(self.process, log), daemon=True).start()

    def _read(self, process: subprocess.Popen[str], log: Path) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(REPLY):
                self._replies.put(json.loads(line[len(REPLY) :]))
        last = (log.read_text(errors="replace").strip().splitlines() or ["it ended"])[-1]
        self._replies.put({"ended": last[:160]})

    def wait(self, word: str, until: float) -> bool:
        """Whether the process said `word` before a time; keeps its results and errors."""
        while True:
            try:
                reply = self._replies.get(timeout=max(0.0, until - time.time()))
            except queue.Empty:
                return False
            if "result" in reply:
                self.results[reply["case"]] = Result(**(reply["result"] | {"case": self.cases[reply["case"]]}))
            if "error" in reply:
                self.errors[reply["case"]] = reply["error"]
            if "ended" in reply:
                missing = [i for i in range(len(self.cases)) if i not in self.results]
                self.errors = dict.fromkeys(missing, reply["ended"]) | self.errors
                return False
            if word in reply:
                return True

    def measure(self, until: float) -> bool:
        """Have it measured; whether it was done before a time."""
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which `wait` says
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.wait("done", until)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            end_session(self.process)

    def left_out(self) -> dict[str, str]:
        """The cases without a result, by name, and why."""
        missing = [i for i in range(len(self.cases)) if i not in self.results]
        return {describe(self.cases[i]): self.errors.get(i, "no time") for i in missing}


def end_session(process: subprocess.Popen[str]) -> None:
    """End a process that leads a session, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe(case: Case) -> str:
    """A case in words."""
    return f"{case.model} {case.name}, {case.cameras} cameras, batch {case.batch}"


def workers_of(args: argparse.Namespace) -> list[Worker]:
    """A worker for each side, the most important first, each with its cases in the order of theirs."""
    sides = [(framework, "") for framework in args.frameworks]
    sides += [("torch", format) for format in args.quantize if "torch" in args.frameworks]
    found = []
    for model, (framework, format) in itertools.product(args.models, sides):
        most = len(get_variant(model).image_keys)
        cameras = [count for count in (most, *range(1, most)) if not args.cameras or count in args.cameras]
        first = [(count, args.batch[0]) for count in cameras]
        cases = [
            Case(model, framework, "sampler", "", None, args.dtype, count, batch, args.steps, args.repeats, format)
            for count, batch in dict.fromkeys([*first, *itertools.product(cameras, args.batch)])
        ]
        if not cases:
            raise SystemExit(f"{model} has 1 to {most} cameras, and none of --cameras {args.cameras}")
        found.append(Worker(f"{model} {cases[0].name}", cases))
    return found


def at_once() -> int:
    """How many workers the GPU's memory has room for; 2 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 2
    return max(1, int(torch.cuda.get_device_properties(0).total_memory / 2**30) // GIB)


def sample(workers: list[Worker], most: int, end: float, logs: Path) -> None:
    """Prepare and measure the workers, `most` at a time, until `end`."""
    waves = [workers[i : i + most] for i in range(0, len(workers), most)]
    for i, wave in enumerate(waves):
        left = end - time.time()
        if left < 5:
            return
        turn = time.time() + left / (len(waves) - i)  # when the next ones begin
        deadline = time.time() + PREPARE * (turn - time.time())
        try:
            for one in wave:
                one.start(deadline, logs / f"{workers.index(one)}.log")
            ready = [one for one in wave if one.wait("ready", deadline)]
            late = (one for one in wave if one not in ready and one.wait("ready", turn - 5))
            for one in itertools.chain(ready, late):
                print(f"{end - time.time():.0f} s left: measuring {one.name}", file=sys.stderr, flush=True)
                one.measure(turn)
        finally:
            for one in wave:
                one.stop()


def train(args: argparse.Namespace, end: float) -> list[str]:
    """Training steps until `end`: rows of benchmarks/training.py, and what was left out.

    PyTorch counts the operations, so that JAX's MFU is PyTorch's times the ratio of their rates.
    """
    rows, slowest, counted = [], 0.0, {}
    for model, side in itertools.product(args.train, args.frameworks):
        begin = time.time()
        if begin + max(slowest, 5) > end:
            rows.append(f"left out: training {model}, {side}: no time")
            continue
        command = [sys.executable, str(Path(__file__).with_name("training.py")), "--model", model, "--sides", side]
        command += ["--rounds", "1", "--batch", str(args.train_batch), "--dtype", args.dtype, "--remat", "full"]
        if get_variant(model).paligemma.lora_rank:
            command += ["--freeze", "lora", "--frozen-dtype", args.dtype]
        print(f"{end - begin:.0f} s left: training {model}, {side}", file=sys.stderr, flush=True)
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        try:
            output, errors = process.communicate(timeout=end - begin)
        except subprocess.TimeoutExpired:
            rows.append(f"left out: training {model}, {side}: no time")
            continue
        finally:
            end_session(process)
        slowest = max(slowest, time.time() - begin)
        found = [line for line in output.splitlines() if line.startswith(f"| {side} |")]
        cells = [cell.strip() for cell in found[0].strip("|").split("|")] if found else []
        if len(cells) < 7 or not cells[3]:  # one that failed has its reason for a rate
            why = cells[2] if cells else "".join(errors.strip().splitlines()[-1:])[:160]
            rows.append(f"left out: training {model}, {side}: {why}")
            continue
        rate, mfu = float(cells[2]), cells[6]
        if mfu:
            counted[model] = float(mfu.rstrip("%")) / rate
        elif model in counted:
            cells[6] = f"{counted[model] * rate:.1f}%"
        rows.append(f"| {' | '.join([model, *cells])} |")
    return rows


def table(report: Report) -> list[str]:
    """The results as rows of a table in Markdown, and the ceilings of the roofline."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for r in report.results:
        stages = [f"{r.stages_ms[name]:.2f}" if name in r.stages_ms else "" for name in ("vision", "prefix", "step")]
        least = report.roofline_ms(r)
        cells = [r.case.model, r.case.name, r.case.cameras, r.case.batch, f"{r.median_ms:.2f}", f"{r.p99_ms:.2f}"]
        cells += [*stages, f"{least:.2f}", f"{r.median_ms / least:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for dtype in dict.fromkeys(r.case.dtype for r in report.results):
        flops, bandwidth = report.ceilings(dtype)
        lines += ["", f"{report.results[0].device}: {flops / 1e12:.2f} TFLOP/s in {dtype}, {bandwidth / 1e9:.0f} GB/s"]
    return lines


def make_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    formats = [format for format in FORMATS if format != WIDE]
    parser.add_argument("--models", nargs="+", default=["pi0", "pi05", "pi0_fast"], help="variants of pi0.variants")
    parser.add_argument("--frameworks", nargs="+", choices=("torch", "jax"), default=["torch", "jax"])
    parser.add_argument("--quantize", nargs="*", choices=formats, default=["w8a8_float8"], help="of PyTorch, too")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cameras", nargs="+", type=int, help="(default: 1 to all)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=10, help="Euler steps, or tokens of π0-FAST (default 10)")
    parser.add_argument("--repeats", type=int, default=20, help="calls per case (default 20)")
    parser.add_argument("--train", nargs="*", default=["pi0_lora", "pi0"], help="variants (default pi0_lora and pi0)")
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything (default 8.7)")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    parser.add_argument("--logs", type=Path, default=Path(".cache/gpu"), help="of the processes (default .cache/gpu)")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    if args.worker is not None:
        worker(args.worker)
        return
    end, workers = time.time() + 60 * args.minutes, workers_of(args)
    args.logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # several processes compile
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sample(workers, at_once(), end - (TRAIN * 60 * args.minutes if args.train else 0), args.logs)
    report = Report([one.results[i] for one in workers for i in sorted(one.results)])
    left_out = {name: why for one in workers for name, why in one.left_out().items()}
    lines = table(report) if report.results else []
    print("\n".join([*lines, "", *(f"left out: {name}: {why}" for name, why in left_out.items())]), flush=True)
    trained = train(args, end)
    if trained:
        print("\n| model | side | batch | steps/s | samples/s | CPU seconds of a step | GiB | MFU |")
        print("|---" * 8 + "|\n" + "\n".join(trained), flush=True)
    if args.out is not None:
        rows = json.loads(report.to_json()) if report.results else []
        write_text(args.out, json.dumps({"sampling": rows, "left_out": left_out, "training": trained}, indent=2) + "\n")


if __name__ == "__main__":
    main()
