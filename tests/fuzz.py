"""A seeded fuzzer of what is read from outside: checkpoints, datasets, configs, tokenizers, norm stats, annotations.

    python tests/fuzz.py --seed 0 --count 2000

Each input is a valid one in which one file was changed, by its structure: types swapped, nulls, wrong lengths, deep
nests, huge numbers, renamed keys, paths that lead elsewhere, truncated bytes. A process of its own reads it, which has
to work or to end in an error of the project that names the file, within LIMIT_S and LIMIT_BYTES, without a write
outside of the target. Prints the outcomes, and exits with 1 if there are others.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (imported before the fork, as all that follows)
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert.checkpoints import Checkpoint, open_checkpoint, write_checkpoint  # noqa: E402
from convert.conversion import convert  # noqa: E402
from convert.inspection import inspect  # noqa: E402
from convert.layouts.registry import LAYOUTS  # noqa: E402
from convert.tensors import Tensor  # noqa: E402
from pi0.assets import Assets  # noqa: E402
from pi0.datasets.annotations import AnnotatedDataset, Questions  # noqa: E402
from pi0.datasets.arrayrecord_writer import build_records  # noqa: E402
from pi0.datasets.check import find_damage  # noqa: E402
from pi0.datasets.errors import DataError  # noqa: E402
from pi0.datasets.images import Encoding  # noqa: E402
from pi0.datasets.lerobot import LeRobotDataset  # noqa: E402
from pi0.datasets.registry import open_dataset  # noqa: E402
from pi0.datasets.statistics import dataset_statistics  # noqa: E402
from pi0.fetch import fetch  # noqa: E402
from pi0.parameters import parameters  # noqa: E402
from pi0.policy.policy import fill_assets  # noqa: E402
from pi0.reading import naming, read_json  # noqa: E402
from pi0.robots.normalize import NormStats, check_norm_stats, load_norm_stats, save_norm_stats  # noqa: E402
from pi0.robots.pipeline import Pipeline  # noqa: E402
from pi0.robots.registry import make_robot  # noqa: E402
from pi0.run_config import RunConfig  # noqa: E402
from pi0.tokenizers.fast import FASTTokenizer  # noqa: E402
from pi0.tokenizers.text import BUNDLED, TextTokenizer  # noqa: E402
from pi0.variants import get_variant, read_variant  # noqa: E402
from pi0_eval.parity.inputs import Inputs  # noqa: E402
from tests.recording import write_recording  # noqa: E402

LIMIT_S, LIMIT_BYTES = 20.0, 2 << 30  # of the process's own time
WAIT_S = 60.0  # until a process that waits, for a pipe say, is ended; longer, as the machine may have other work
DEEP = "\0deep\0"  # replaced by a deep nest in the text of a file
ROBOT = "metaworld"
PI0 = get_variant("tiny", action_dim=8, max_token_len=24)
FAST = get_variant("tiny_pi0_fast", image_keys=PI0.image_keys, action_dim=8, max_token_len=64, vocab_size=1280)
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**40, 2**63, 10**400, 0.5, float("nan"), float("inf"), -1e308, "", "x", "3",
    "../../outside", "/etc/passwd", "/dev/zero", "a/../../b", "\0", "\ud800", "x" * 100_000, [], {}, [[]], [None],
    {"": {}}, [1, 2, 3], {"a": 1}, DEEP, "hf://", "gs://", "ftp://x/y", "json:loads", "{chunk_index.__class__}",
    "{x:99999999999d}",
)  # fmt: skip


# ---- valid inputs ----------------------------------------------------------------------------------------------------


def make_inputs(root: Path) -> None:
    """One folder for each kind of input, below `root`."""
    rng = np.random.default_rng(0)
    stats = {k: NormStats(*np.array([[1.0], [2.0], [-1.0], [3.0]]) * np.ones(4)) for k in ("state", "actions")}
    text = TextTokenizer(BUNDLED).reference()
    for config, layouts in (
        (PI0, ("pi0_jax", "pi0_torch", "openpi_jax", "openpi_torch", "lerobot")),
        (FAST, ("pi0_torch",)),
    ):
        fast = FASTTokenizer("bundled://fast_tokenizer").reference() if config is FAST else None
        assets = Assets(config, stats, "arm", "quantile", text, ROBOT, 3, action_tokenizer=fast)
        ours = {n: Tensor.of(rng.normal(size=p.shape).astype(np.float32)) for n, p in parameters(config).items()}
        for layout in layouts:
            folder = root / f"checkpoint {config.kind} {layout}"
            folder.mkdir(parents=True)
            write_checkpoint(Checkpoint(folder, LAYOUTS["pi0_jax"], assets, ours), folder, layout)
    convert(root / "checkpoint pi0 pi0_torch", root / "checkpoint signed", to="pi0_torch")
    sharded = Path(shutil.copytree(root / "checkpoint pi0 pi0_torch", root / "checkpoint sharded"))
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    names = LAYOUTS["pi0_torch"].shapes(PI0)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    run = root / "checkpoint run" / "checkpoints" / "000300"
    shutil.copytree(root / "checkpoint pi0 pi0_jax", run)
    openpi = Path(shutil.copytree(root / "checkpoint pi0 openpi_torch", root / "checkpoint foreign"))
    (openpi / "config.json").write_text(json.dumps({"action_dim": 8, "paligemma_variant": "gemma_2b", "type": "pi0"}))
    write_recording(root / "dataset v3.0", make_robot(ROBOT))
    shutil.copytree(ROOT / "tests" / "datasets" / "metaworld_v21_images", root / "dataset v2.1 images")
    shutil.copytree(ROOT / "tests" / "datasets" / "metaworld_v21", root / "dataset v2.1 videos")
    columns: dict[str, Any] = {"states": ("observation.state", "action"), "actions": ()}
    recorded = LeRobotDataset(root / "dataset v2.1 images", image_size=(24, 32), **columns)
    build_records(recorded, "", root / "records", Encoding("jpeg:95"))
    for kind in ("config", "run config", "text", "norm stats", "annotations", "arrays"):
        (root / kind).mkdir()
    (root / "config" / "model.json").write_text(json.dumps(PI0.to_dict()))
    from configs.debug import get_config

    (root / "run config" / "config.json").write_text(json.dumps(get_config().to_dict()))
    shutil.copyfile(fetch(BUNDLED), root / "text" / "tokenizer.model")
    shutil.copytree(fetch("bundled://fast_tokenizer"), root / "fast")
    save_norm_stats(root / "norm stats" / "norm_stats.json", stats)
    spans = [{"episode": 0, "start_frame": i, "end_frame": i + 4, "subtask": "reach"} for i in (0, 4, 8)]
    questions = [{"question": "where?", "answer": "there"}, {"image": "i.png", "question": "what?", "answer": "a door"}]
    for name, rows in (("subtasks", spans), ("questions", questions)):
        (root / "annotations" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = Inputs.random(PI0)
    arrays = inputs.observation.to_dict() | {"actions": inputs.actions, "noise": inputs.noise, "time": inputs.time}
    np.savez(root / "arrays" / "inputs.npz", **arrays)


# ---- what reads them -------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path, out: Path) -> None:
    inspect(folder)
    checkpoint = open_checkpoint(folder)
    for tensor in checkpoint.ours.values():
        tensor.read(())
    overrides = {"robot": ROBOT, "tokenizer": BUNDLED} if checkpoint.assets.robot is None else {}
    if checkpoint.assets.model.family.action_tokens and not checkpoint.assets.action_tokenizer:
        overrides["action_tokenizer"] = "bundled://fast_tokenizer"
    with naming(checkpoint.folder):  # as a policy's `from_pretrained`
        pipeline = Pipeline.from_assets(fill_assets(checkpoint.assets, checkpoint.norm_stats, **overrides))
        image = np.zeros((30, 40, 3), np.uint8)
        frame = {key: image for key in pipeline.robot.cameras} | {"state": np.ones(4), "prompt": "open the drawer"}
        pipeline(frame, actions=False)
    convert(folder, out, to="pi0_jax" if checkpoint.layout.name != "pi0_jax" else "pi0_torch")


def read_dataset(folder: Path, out: Path, format: str = "lerobot") -> None:
    robot = make_robot(ROBOT)
    find_damage(folder, format=format)
    for skip in (True, False):
        dataset = open_dataset(folder, robot, format=format, action_horizon=5, skip_damaged=skip)
        for i in {0, len(dataset) // 2, len(dataset) - 1} if len(dataset) else ():
            dataset[i]
    dataset_statistics(open_dataset(folder, robot, format=format, action_horizon=5, cameras=[]), robot)


def read_text_tokenizer(folder: Path, out: Path) -> None:
    tokenizer = TextTokenizer(folder / "tokenizer.model")
    ids, _ = tokenizer.encode_prompt("open the drawer, and close it again", 48, np.linspace(-1, 1, 8))
    tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


def read_fast(folder: Path, out: Path) -> None:
    tokenizer = FASTTokenizer(folder)
    tokenizer.decode(tokenizer.encode(np.sin(np.arange(40.0)).reshape(10, 4)), 10, 4)
    tokenizer.decode(list(range(min(256, tokenizer.vocab_size))), fallback=True)
    tokenizer.save(out)


def read_run_config(folder: Path, out: Path) -> None:
    try:
        RunConfig.from_dict(read_json(folder / "config.json"))
    except ValueError as error:  # the command names the experiment; here the file stands for it
        raise type(error)(f"{folder}: {error}") from error


def read_annotations(folder: Path, out: Path) -> None:
    dataset = open_dataset(folder.parent / "recording", make_robot(ROBOT), action_horizon=5)
    AnnotatedDataset(dataset, folder / "subtasks.jsonl")[0]
    questions = Questions(folder / "questions.jsonl", "base_0_rgb")
    if len(questions):
        questions[0]


def read_norm_stats(folder: Path, out: Path) -> None:
    stats = load_norm_stats(folder / "norm_stats.json")
    with naming(folder):
        check_norm_stats(stats, "quantile", {"state": 4, "actions": 4}, {"state": 8, "actions": 8})


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "checkpoint": read_checkpoint,
    "dataset": read_dataset,
    "records": functools.partial(read_dataset, format="arrayrecord"),
    "config": lambda folder, out: read_variant(str(folder / "model.json")),
    "run config": read_run_config,
    "text": read_text_tokenizer,
    "fast": read_fast,
    "norm stats": read_norm_stats,
    "annotations": read_annotations,
    "arrays": lambda folder, out: Inputs.load(folder / "inputs.npz", PI0),
}


# ---- changes ---------------------------------------------------------------------------------------------------------


def change_value(value: Any, rng: random.Random) -> Any:
    """The value with one node changed, dropped, renamed or repeated."""
    value = copy.deepcopy(value)
    parent, key, node = None, None, value
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
        parent, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
    if parent is None:
        return copy.deepcopy(rng.choice(ODD))
    how = rng.choice(("odd", "odd", "odd", "drop", "rename", "repeat", "wrap", "swap"))
    if how == "drop":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[rng.choice((f"{key}_", "", "x", str(key).upper(), "../x"))] = parent.pop(key)
    elif how == "repeat" and isinstance(parent, list):
        parent[:] = parent * rng.choice((2, 3, 50))
    elif how == "wrap":
        parent[key] = rng.choice(([node], {"x": node}, str(node)))
    elif how == "swap":
        parent[key] = copy.deepcopy(rng.choice(list(parent.values()) if isinstance(parent, dict) else parent))
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return value


def change_json(content: bytes, rng: random.Random) -> bytes:
    depth = rng.choice((200, 100_000))
    text = json.dumps(change_value(json.loads(content), rng))
    return text.replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode()


def change_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = change_json(lines[i], rng)
    return b"\n".join(lines) + b"\n"


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = change_json(content[8 : 8 + length], rng)
    size = rng.choice((len(header),) * 8 + (2**40, 0, length))
    return struct.pack("<Q", size) + header + content[8 + length :]


def change_parquet(content: bytes, rng: random.Random) -> bytes:
    """A column that is dropped, renamed, of another type or with odd values."""
    table = pq.read_table(io.BytesIO(content))
    i = rng.randrange(table.num_columns)
    name, rows = table.column_names[i], table.num_rows
    values = table.column(i).to_pylist()
    how = rng.choice(
        ("drop", "rename", "null", "all null", "huge", "negative", "text", "lists", "float", "shuffle", "rows")
    )
    if how == "drop":
        table = table.remove_column(i)
    elif how == "rename":
        table = table.rename_columns([f"{c}_" if c == name else c for c in table.column_names])
    elif how == "rows":
        table = table.slice(0, rng.randrange(rows + 1))
    else:
        made: dict[str, Callable[[], pa.Array]] = {
            "null": lambda: pa.array(
                [None if j == rows // 2 else v for j, v in enumerate(values)], table.column(i).type
            ),
            "all null": lambda: pa.nulls(rows, table.column(i).type),
            "huge": lambda: pa.array([2**62] * rows),
            "negative": lambda: pa.array([-5] * rows),
            "text": lambda: pa.array(["../../x"] * rows),
            "lists": lambda: pa.array([[[1.0]]] * rows),
            "float": lambda: pa.array([float("nan")] * rows),
            "shuffle": lambda: pa.array(values[::-1], table.column(i).type),
        }
        table = table.set_column(i, name, made[how]())
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def change_npz(content: bytes, rng: random.Random) -> bytes:
    """An array with another header, shape or dtype."""
    with np.load(io.BytesIO(content)) as loaded:
        arrays = dict(loaded)
    name = rng.choice(list(arrays))
    how = rng.choice(("drop", "shape", "dtype", "object", "text", "rename", "header"))
    if how in ("drop", "rename"):
        array = arrays.pop(name)
        arrays |= {f"{name}_": array} if how == "rename" else {}
    else:
        odd = {"shape": arrays[name][None], "dtype": arrays[name].astype(complex), "text": np.array(["x"])}
        arrays[name] = odd.get(how, np.array([{}], object) if how == "object" else arrays[name])
    file = io.BytesIO()
    np.savez(file, **arrays)
    shape = rng.choice((b"(1099511627776,)", b"(-1, 3)", b"[" * 900, b"(9,)*9999999"))
    return file.getvalue().replace(b"(2, 28, 42, 3)", shape) if how == "header" else file.getvalue()


def change_npy(content: bytes, rng: random.Random) -> bytes:
    """An array with another shape, dtype or values; half of the time of the same number of bytes."""
    array = np.load(io.BytesIO(content))
    how = rng.choice(("huge", "negative", "zero", "shuffle", "cast", "short", "deep", "object"))
    made: dict[str, Callable[[], Any]] = {
        "huge": lambda: np.full_like(array, np.iinfo(array.dtype).max if array.dtype.kind in "iu" else np.inf),
        "negative": lambda: np.full_like(array, -(2**40) if array.dtype == np.int64 else 0),
        "zero": lambda: np.zeros_like(array),
        "shuffle": lambda: array[::-1],
        "cast": lambda: array.view(f"V{array.dtype.itemsize}"),
        "short": lambda: array[: len(array) // 2],
        "deep": lambda: array[None],
        "object": lambda: array.astype(object),
    }
    file = io.BytesIO()
    np.save(file, made[how](), allow_pickle=True)
    return file.getvalue()


def proto(field: int, content: bytes) -> bytes:
    size, out = len(content), bytearray([field << 3 | 2])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes([*out, size]) + content


def change_model(content: bytes, rng: random.Random) -> bytes:
    """A SentencePiece model with a growing normalizer, long pieces or other parts."""
    growing = struct.pack("<I", 1024) + bytes(1024) + b"x" * 100_000 + b"\0"
    extra = rng.choice(
        (proto(3, proto(2, growing)), proto(1, proto(1, b"y" * 50_000)), proto(2, b"\xff"), proto(1, b""))
    )
    return content + extra if rng.random() < 0.7 else change_bytes(content, rng)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Truncated, emptied, flipped, repeated or of something else."""
    at = rng.randrange(len(content) or 1)
    how = rng.randrange(6)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + bytes(rng.randrange(256) for _ in range(8)) + content[at + 8 :]
    if how == 2:
        return content[:at] + content[at + rng.randrange(1, 64) :]
    return (b"", content * 2, b"\xff\xfe" + content)[how - 3]


CHANGES = {
    ".json": change_json, "_METADATA": change_json, ".zarray": change_json, ".jsonl": change_lines, ".npz": change_npz,
    ".npy": change_npy, ".safetensors": change_safetensors, ".parquet": change_parquet, ".model": change_model,
}  # fmt: skip


def change(folder: Path, rng: random.Random) -> str:
    """Change one file of a folder; returns what was done. Files with a structure are preferred."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.is_symlink())
    if not files:
        return "nothing is left"
    known = [f for f in files if any(f.name.endswith(end) for end in CHANGES)]
    file = rng.choice(known) if known and rng.random() < 0.85 else rng.choice(files)
    how = rng.random()
    if how < 0.06:
        file.unlink()
        target = rng.choice(("/etc/passwd", "/dev/zero", "../../canary", file.name, "nowhere", "folder", "pipe", None))
        if target == "folder":
            file.mkdir()
        elif target == "pipe":
            os.mkfifo(file)
        elif target is not None:
            file.symlink_to(target)
        return f"{file.relative_to(folder)}: {target}"
    content, by = file.read_bytes(), next((c for end, c in CHANGES.items() if file.name.endswith(end)), change_bytes)
    by = by if how < 0.85 else change_bytes
    try:
        changed = by(content, rng)
    except Exception:  # it has no structure any more, after another change
        changed = change_bytes(content, rng)
    file.write_bytes(changed)
    return f"{file.relative_to(folder)}: {by.__name__}"


# ---- one input, and all ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input: "works", "refused" by a named error, or a fault."""

    number: int
    kind: str
    done: str
    result: str
    detail: str = ""

    @property
    def fault(self) -> bool:
        return self.result not in ("works", "refused")


def judge(error: BaseException, folder: Path) -> tuple[str, str]:
    """Whether an error is one of the project's, raised by its code, that names a file of the input."""
    text = "".join(traceback.format_exception(error))[-3000:]
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    own = type(error).__module__.split(".")[0] in ("pi0", "convert", "pi0_eval")
    plain = isinstance(error, ValueError | OSError) and frame is not None and Path(frame.filename).is_relative_to(ROOT)
    opening = isinstance(error, OSError) and error.filename is not None
    if not (own or plain or opening):
        return "traceback", text
    message = str(error)
    return ("refused", message) if str(folder) in message or isinstance(error, DataError) else ("unnamed file", text)


def child(kind: str, case: Path, report: Path, rng: random.Random) -> None:
    """Change the input and read it, in this process, and report."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1), os.dup2(null, 2)
    os.chdir(case)
    done = "; ".join(change(case / "input", rng) for _ in range(rng.choice((1, 1, 1, 2))))
    report.write_text(json.dumps((done, "crashed", "")))
    before = names(case / "input")
    try:
        READERS[kind](case / "input", case / "out")
        result = ("works", "")
    except BaseException as error:
        result = judge(error, case / "input")
    if names(case / "input") != before:
        result = ("wrote outside", f"{before ^ names(case / 'input')}")
    report.write_text(json.dumps((done, *result)))


def names(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*")}


class Fuzzer:
    """Makes inputs from numbers and reads each in a process of its own."""

    def __init__(self, root: Path, seed: int):
        self._root, self._seed = root, seed
        pid = os.fork()  # in a process of its own: the parent of all others must not start threads
        if not pid:
            code = 1
            try:
                make_inputs(root / "valid")
                write_recording(root / "recording", make_robot(ROBOT))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("the valid inputs cannot be made")
        self.inputs = sorted(f.name for f in (root / "valid").iterdir())

    def __call__(self, number: int) -> Outcome:
        """The outcome of one input, which depends on the seed and its number alone."""
        rng = random.Random(f"{self._seed}/{number}")
        name = rng.choice(self.inputs)
        kind = name.split()[0] if name.split()[0] in READERS else name
        box = self._root / str(number)
        case, report = box / "case", box / "report"
        case.mkdir(parents=True)
        report.write_text(json.dumps(("", "not made", "")))
        shutil.copytree(self._root / "valid" / name, case / "input")
        (case / "recording").symlink_to(self._root / "recording")
        (case / "canary").write_text("untouched")
        begin, late = time.perf_counter(), False
        pid = os.fork()
        if not pid:
            try:
                child(kind, case, report, rng)
            finally:
                os._exit(0)
        ended = 0
        while not ended:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if not (ended or late) and time.perf_counter() - begin > WAIT_S:
                late = True
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        done, result, detail = json.loads(report.read_text())
        if not status and usage.ru_utime + usage.ru_stime > LIMIT_S:
            result, detail = "too slow", f"{usage.ru_utime + usage.ru_stime:.1f} s"
        elif status:
            result, detail = "too slow" if late else "crashed", f"status {status}"
        elif usage.ru_maxrss * 1024 > LIMIT_BYTES:
            result, detail = "too much memory", f"{usage.ru_maxrss >> 10} MiB; {detail}"
        left = {f.name for f in case.iterdir()} - {"out"}
        outside = left != {"input", "canary", "recording"} or (case / "canary").read_text() != "untouched"
        if outside or {f.name for f in box.iterdir()} != {"case", "report"}:
            result = "wrote outside"
        shutil.rmtree(box)
        return Outcome(number, kind, f"{name}: {done}", result, detail)


def fuzz(seed: int, count: int, first: int = 0, log: Callable[[str], None] = lambda _: None) -> list[Outcome]:
    """The outcomes of `count` inputs, from number `first` on."""
    with tempfile.TemporaryDirectory() as temporary:
        fuzzer, outcomes = Fuzzer(Path(temporary).resolve(), seed), []
        for number in range(first, first + count):
            outcomes.append(fuzzer(number))
            if outcomes[-1].fault:
                o = outcomes[-1]
                log(f"{o.number}: {o.done}: {o.result}\n{o.detail}\n")
        return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input, to try one again")
    args = parser.parse_args()
    outcomes = fuzz(args.seed, args.count, args.first, log=lambda text: print(text, flush=True))
    counts = collections.Counter((o.kind, o.result) for o in outcomes)
    for (kind, result), n in sorted(counts.items()):
        print(f"{kind:12} {result:16} {n:6}")
    faults = sum(o.fault for o in outcomes)
    print(f"seed {args.seed}, {len(outcomes)} inputs: {faults} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
