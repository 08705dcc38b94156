"""What CI systems read: JUnit XML, badges, the published action and the workflow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from pi0_eval.parity import command
from pi0_eval.parity.ci import to_badge, to_json, to_junit
from pi0_eval.parity.report import Report, Row

ROOT = Path(__file__).parents[3]


def report(**proofs: float) -> Report:
    """Four stages, of which some are proved less well than usual."""
    rows = [Row(s, proofs.get(s, 1e-15), 1e-7, 1e-7, 1e-7, 2e-7) for s in ("image", "velocity", "loss", "actions")]
    return Report("one", "two", "float32", rows, np.zeros((1, 2, 3)), np.zeros((1, 2, 3)))


def test_junit_of_a_pass():
    root = ElementTree.fromstring(to_junit({"two": report()}))
    (suite,) = root
    counts = {"tests": "4", "failures": "0", "errors": "0"}
    assert all(counts.items() <= element.attrib.items() for element in (root, suite))
    assert [case.get("name") for case in suite.iter("testcase")] == ["image", "velocity", "loss", "actions"]
    assert not list(root.iter("failure"))
    values = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert values["a"] == "one" and values["verdict"].startswith("PASSED")


def test_junit_of_a_failure():
    """Every stage that is out fails; the table is in the first of them alone."""
    root = ElementTree.fromstring(to_junit({"jax": report(), "torch": report(velocity=1e-3, loss=1e-2)}))
    assert (root.get("tests"), root.get("failures")) == ("8", "2")
    assert [suite.get("failures") for suite in root] == ["0", "2"]
    failures = {c.get("name"): c.find("failure") for c in root[1].iter("testcase") if c.find("failure") is not None}
    assert list(failures) == ["velocity", "loss"]
    assert failures["velocity"].get("type") == "another function"
    assert "1.00e-03 in float64" in failures["velocity"].get("message")
    assert "FAILED: another function" in failures["velocity"].text and not failures["loss"].text


def test_junit_holds_any_name():
    """Names come from checkpoints' paths: markup and control characters do not break the file."""
    hostile = "]]></testsuite><x y=\"'&\x00\x1b\ud800"
    made = Report(hostile, hostile, "float32", report(**{"image": 1.0}).rows, None, None)
    root = ElementTree.fromstring(to_junit({hostile: made, "other": made}).encode())
    value = next(p.get("value") for p in root.iter("property"))
    assert value.startswith("]]></testsuite><x y=\"'&") and len(root) == 2


def test_badge():
    passed, failed = json.loads(to_badge({"two": report()})), json.loads(to_badge({"two": report(loss=1.0)}))
    assert passed["schemaVersion"] == 1 and passed["message"] == "proved, float32" and not passed["isError"]
    assert failed["message"] == "out: loss" and failed["isError"] and failed["color"] != passed["color"]
    assert json.loads(to_badge({"x": report(), "y": report()}))["message"] == "proved, float32, 2 ways"


def test_json_of_several():
    values = json.loads(to_json({"x": report(), "y": report(loss=1.0)}))
    assert (
        not values["passed"] and values["reports"]["x"]["passed"] and values["reports"]["y"]["first_failure"] == "loss"
    )
    assert json.loads(to_json({"x": report()})) == json.loads(report().to_json())


# ---- progress


def test_never_silent(monkeypatch, capsys):
    """Nothing said for a while: the last line is said again, and not after the end."""
    monkeypatch.setattr(command, "SILENCE", 0.2)
    with command.Progress("comparing") as progress:
        assert capsys.readouterr().err == "   0.0 s  comparing\n"
        time.sleep(1.0)
        progress("computing")
    lines = [line.split(" s  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert len(lines) >= 2 and set(lines[:-1]) == {"still: comparing"} and lines[-1] == "computing"
    time.sleep(0.6)
    assert not capsys.readouterr().err


# ---- the published action


def action() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def compare_step(tmp_path: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """The action's own shell script, with a `pi0-parity` that prints its arguments, a line each."""
    program = tmp_path / "pi0-parity" / "bin" / "pi0-parity"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    (step,) = [step for step in action()["runs"]["steps"] if step.get("name") == "Compare"]
    given = {name: str(spec["default"]) for name, spec in action()["inputs"].items()} | inputs
    env = {name: re.sub(r"\$\{\{ inputs\.(\S+) \}\}", lambda m: given[m[1]], v) for name, v in step["env"].items()}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    env |= {"PATH": os.environ["PATH"], "RUNNER_TEMP": str(tmp_path)}
    return subprocess.run(shell, env=env, cwd=tmp_path, capture_output=True, text=True)


def test_action_compares_two(tmp_path: Path):
    """What an input holds is one argument, never a command."""
    ran = compare_step(tmp_path, a="$(touch owned)", b="b; touch owned", arguments="--steps 4 --no-gradients")
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0 and lines[-3:] == ["--", "$(touch owned)", "b; touch owned"]
    assert lines[-6:-3] == ["--steps", "4", "--no-gradients"] and not (tmp_path / "owned").exists()
    assert {"--json", "--html", "--junit", "--badge"} <= set(lines)


def test_action_runs_one_in_both(tmp_path: Path):
    lines = compare_step(tmp_path, checkpoint="c d", dtype="bfloat16").stdout.splitlines()
    assert lines[:2] == ["--dtype", "bfloat16"] and lines[-2:] == ["c d", "c d"]
    assert lines[-7:-3] == ["--framework-a", "jax", "--framework-b", "torch"]


@pytest.mark.parametrize("inputs", [{}, {"a": "one"}, {"a": "one", "b": "two", "checkpoint": "three"}])
def test_action_refuses_other_inputs(tmp_path: Path, inputs: dict[str, str]):
    ran = compare_step(tmp_path, **inputs)
    assert ran.returncode == 2 and "either checkpoint, or both a and b" in ran.stdout


def test_action_pins_what_it_uses():
    """By commit, the same as the workflow's; no input within a command."""
    made, workflow = action(), (ROOT / "docs" / "parity-workflow.yml").read_text(encoding="utf-8")
    assert made["runs"]["using"] == "composite" and all(spec["description"] for spec in made["inputs"].values())
    for step in made["runs"]["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]) and step["uses"] in workflow
        else:
            assert step["shell"] == "bash" and "${{" not in step["run"]


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="needs actionlint: the extra workflows")
@pytest.mark.parametrize("change", ["", "checkpoint: policy", "nonsense: policy"])
def test_actionlint(tmp_path: Path, change: str):
    """The workflows of docs/ci.md, and one that uses the action: its inputs are known, and another one is not."""
    workflows = tmp_path / ".github" / "workflows"
    workflows.mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shutil.copy(ROOT / "action.yml", tmp_path)
    text = (ROOT / "docs" / "parity-workflow.yml").read_text(encoding="utf-8")
    if change:
        text = "on: push\njobs:\n  parity:\n    runs-on: ubuntu-latest\n    steps:\n"
        text += f"      - uses: ./\n        with:\n          {change}\n"
    (workflows / "parity.yml").write_text(text)
    if not change:
        blocks = dict(re.findall(r"```(ya?ml)\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), re.S))
        (workflows / "calls.yml").write_text(f"on: push\n{blocks['yaml']}")
        steps = {"runs-on": "ubuntu-latest", "steps": yaml.safe_load(blocks["yml"])}
        (workflows / "uses.yml").write_text(yaml.safe_dump({"on": "push", "jobs": {"parity": steps}}))
    ran = subprocess.run(["actionlint", "-no-color"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == ("nonsense" in change), ran.stdout
    assert ("nonsense" in ran.stdout) == ("nonsense" in change)


@pytest.mark.skipif(shutil.which("check-jsonschema") is None, reason="needs check-jsonschema")
@pytest.mark.parametrize(("kind", "file"), [("actions", "action.yml"), ("workflows", "docs/parity-workflow.yml")])
def test_schema(kind: str, file: str):
    """GitHub's own schemas of actions and workflows."""
    check = ["check-jsonschema", "--builtin-schema", f"vendor.github-{kind}", file]
    ran = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
