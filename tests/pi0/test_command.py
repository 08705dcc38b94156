"""What all commands share."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pi0.command import exit_on_error, main, make_parser
from pi0.plugins import missing_extra

ROOT = Path(__file__).parents[2]

GS = "gs://bucket/out"
WRITING = {
    "pi0.training.command": ["--config", "debug", "--workdir", GS],
    "convert.conversion": ["tests/golden/pi0/checkpoint", GS, "--to", "pi0_torch"],
    "pi0_eval.replay": ["x", "bundled://metaworld_v30", "--out", GS],
    "pi0_eval.scores": ["x", "--json", GS],
    "pi0_eval.parity.command": ["x", "y", "--html", GS],
    "pi0_eval.bench": ["--json", GS],
    "pi0_eval.quantization.command": ["x", "--data", "bundled://metaworld_v30", "--out", GS],
    "pi0_eval.demo": ["--workdir", GS],
    "pi0_serve.command": ["x", "--record", GS],
    "pi0.datasets.statistics": [
        *["x", "--robot", "metaworld", "--action-horizon", "5", "--asset-id", "metaworld", "--out"],
        GS,
    ],
    "pi0.datasets.cache": ["bundled://metaworld_v30", "--cache", GS],
    "pi0.datasets.fit_fast": ["bundled://metaworld_v30", GS, "--robot", "metaworld"],
}


LOCAL = ("pi0_eval.demo", "pi0.datasets.cache")  # which write what is mapped into memory, or many things


@pytest.mark.parametrize("module", WRITING)
def test_addresses_that_cannot_be_written_to_are_refused(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of places that we do not know, of buckets without the extra, and by some commands of every bucket."""
    monkeypatch.chdir(tmp_path)  # where a folder named gs: would be made
    main = importlib.import_module(module).main
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("gcsfs", "s3fs") else True)
    without = "cannot be written to" if module in LOCAL else "pip install 'pi0["
    unknown = "cannot be written to" if module in LOCAL else "neither a path of this machine nor an address"
    for address, message in ((GS, without), ("s3://bucket/out", without), ("ftp://host/out", unknown)):
        with pytest.raises(SystemExit) as exit:
            main([argument.replace(GS, address) for argument in WRITING[module]])
        assert exit.value.code != 0
        assert message in capsys.readouterr().err
    assert os.listdir() == []


SUBPROCESS = """
import sys
{blocked}
from pi0.command import exit_on_error
import importlib
def run(arguments):
    importlib.import_module({module!r}).main(arguments)
exit_on_error("pi0-x", code=3)(run)({arguments!r})
"""


def run(module: str, arguments: list[str], blocked: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, in which some packages are not installed."""
    lines = "\n".join(f"sys.modules[{name!r}] = None" for name in blocked)
    script = SUBPROCESS.format(blocked=lines, module=module, arguments=arguments)
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "ml_collections", "absl", "tensorboardX")
EXPORT = "tests/written_before/export"
PARITY = "pi0_eval.parity.command"


@pytest.mark.parametrize(
    ("module", "arguments", "blocked", "extra"),
    [
        ("pi0.training.command", ["--config", "debug", "--workdir", "{}"], JAX, "train"),
        ("pi0.training.command", ["--config", "debug", "--workdir", "{}", "--framework", "jax"], ("jax",), "jax"),
        ("pi0.training.command", ["--config", "debug", "--workdir", "{}", "--framework", "torch"], ("torch",), "torch"),
        ("pi0_jax.planning.command", ["--config", "debug", "--topology", "gpu:1x80"], ("jax",), "jax"),
        ("pi0_eval.demo", ["--workdir", "{}"], JAX, "jax"),
        ("pi0_eval.demo", ["--workdir", "{}"], ("torch",), "torch"),
        (PARITY, [EXPORT, EXPORT, "--framework-b", "jax"], JAX, "jax"),
        (PARITY, [EXPORT, EXPORT], ("torch",), "torch"),
        ("pi0_eval.replay", [EXPORT, "bundled://metaworld_v30", "--framework", "jax"], JAX, "jax"),
        ("pi0_eval.replay", [EXPORT, "bundled://metaworld_v30"], ("torch",), "torch"),
        ("pi0.datasets.cache", ["bundled://metaworld_v30", "--cache", "{}"], ("av", "pyarrow"), "data"),
    ],
)
def test_the_extra_that_is_missing_is_named(
    module: str, arguments: list[str], blocked: tuple[str, ...], extra: str, tmp_path: Path
):
    """And a run in the folder stays."""
    (tmp_path / "metrics.jsonl").touch()
    result = run(module, [argument.format(tmp_path) for argument in arguments], blocked)
    errors = [line for line in result.stderr.splitlines() if not re.match(r" *\d+\.\d s  ", line)]  # but for progress
    assert result.returncode in (1, 2) and len(errors) == 1, result.stderr
    assert f"pip install 'pi0[{extra}]'" in result.stderr
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_other_import_errors_are_no_missing_extra():
    """They are faults of code, and keep their traceback."""
    for error in (ImportError("cannot import name 'x' from 'jax'", name="jax"), ModuleNotFoundError("", name="pi0.x")):
        assert missing_extra(error) is None

        @exit_on_error("pi0-x")
        def fail(error: ImportError = error) -> None:
            raise error

        with pytest.raises(type(error)):
            fail()


@pytest.mark.parametrize("module", [*WRITING, "pi0_jax.planning.command", "convert.inspection", "pi0.datasets.check"])
@pytest.mark.parametrize("unknown", ["--nosuch=1", "--nosuch", "-x"])
def test_unknown_arguments_are_named_with_what_exists(
    module: str, unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before those that are missing."""
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(module).main([unknown, "x"])
    error = capsys.readouterr().err
    assert exit.value.code in (1, 2) and error.count("\n") == 1
    assert f"unknown argument {unknown}; known are --help, --version, " in error


def test_values_are_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("pi0-x", "")
    parser.add_argument("--shift", type=float)
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--shift", "-1.5"]).shift == parser.parse_args(["--sh=-1.5"]).shift == -1.5
    assert parser.parse_args(["--", "--nosuch"]).rest == ["--nosuch"]
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--shift", "much"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "pi0-x: argument --shift: invalid float value: 'much'; pi0-x --help explains them all\n"
    )


@pytest.mark.parametrize("arguments", [["--nosuch"], ["trian"], []])
def test_the_command_pi0(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["pi0", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    error = capsys.readouterr().err
    assert exit.value.code in (1, 2) and error.startswith("pi0: ") and error.count("\n") == 1


INTERRUPTED = """
import importlib, os, signal, sys, threading
from pi0.command import load_command
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children do
class Slow:
    def find_spec(self, name, *_):
        if name == NAME:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Slow())
load_command("train")(["--config", "debug", "--workdir", sys.argv[1]])
"""


@pytest.mark.parametrize("module", ["pi0.training.command", "ml_collections", "jax"])
def test_an_interrupt_while_importing_is_one_line(module: str, tmp_path: Path):
    script = f"NAME = {module!r}" + INTERRUPTED
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "pi0-train: interrupted\n")


def test_help_of_training_imports_no_jax():
    blocked = "jax", "jaxlib", "flax", "torch"
    result = run("pi0.training.command", ["--help"], blocked)
    assert result.returncode == 0 and "--workdir" in result.stdout, result.stderr
