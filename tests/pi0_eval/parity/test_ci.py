"""What CI systems read: JUnit XML, badges, the published action and the workflow."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np

from pi0_eval.parity.ci import to_badge, to_json, to_junit
from pi0_eval.parity.report import Report, Row


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
