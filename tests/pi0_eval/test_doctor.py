"""`pi0-doctor`: working set-ups in which it finds nothing, and faults of which it names the cause first."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from pi0_eval.doctor.command import main
from pi0_eval.doctor.diagnosis import CHECKS
from pi0_eval.doctor.findings import CAUSES, LIKELY, POSSIBLE, VERY_LIKELY, Finding, ordered
from pi0_eval.doctor.html import to_html
from tests.doctor import faults
from tests.doctor.faults import FAULTS, FOLDER, SetUp, working
from tests.pi0_serve.serving import serve

QUICK = (  # one or two of each kind of check; the others are slow
    *("stats_units", "rotated", "swapped", "black", "new_prompt", "gripper_state"),
    *("absolute", "half_rate", "short_episodes", "one_step", "blind", "slow"),
)
CASES = [
    pytest.param(*case, id=case[1].__name__, marks=() if case[1].__name__ in QUICK else pytest.mark.slow)
    for case in FAULTS
]
DATA = ["--data", "bundled://metaworld_v30", "--episodes", "3"]


def standing(name: str):
    """A working set-up by a clock that stands still: on a busy machine a chunk is late, whatever else."""
    return dataclasses.replace(working(name), clock=lambda: 0.0)


@pytest.mark.parametrize("name", ["velocities", "positions"])
def test_a_working_set_up(name: str):
    """Nothing is found, and every check was done but that of a precision there is no other of."""
    diagnosis = standing(name).diagnose()
    assert [(f.cause, f.evidence) for f in diagnosis.findings] == []
    assert set(diagnosis.healthy) == CHECKS.keys() and not diagnosis.unjudged


def test_a_working_set_up_without_training_data():
    """The held-out recordings alone: nothing is found, and what cannot be judged is said."""
    diagnosis = dataclasses.replace(standing("velocities"), known=None).diagnose()
    assert not diagnosis.findings and sum("no --training" in text for text in diagnosis.unjudged) == 3


def test_recordings_of_a_server():
    """Their frames are requests, and their actions the policy's own: neither is held against the training data."""
    set_up = standing("velocities")
    seen = dataclasses.replace(set_up.seen, fps=None, actions=None)
    diagnosis = dataclasses.replace(set_up, seen=seen).diagnose()
    assert not diagnosis.findings and diagnosis.unjudged == ["rate of control: the frames are a server's requests"]


@pytest.mark.parametrize(("cause", "fault", "name"), CASES)
def test_a_fault(cause, fault, name):
    diagnosis = fault(standing(name)).diagnose()
    assert diagnosis.findings and diagnosis.findings[0].cause == cause, diagnosis.to_text()


def test_every_cause_has_a_check():
    assert {cause for causes in CHECKS.values() for cause in causes} == CAUSES.keys()
    assert {cause for cause, _, _ in FAULTS} == CAUSES.keys()


def test_the_order_of_findings():
    """The likelier first, then from the camera to the motor; symptoms step back behind a cause that explains them."""
    found = [Finding("jumps", LIKELY, ""), Finding("latency", POSSIBLE, ""), Finding("stats", LIKELY, "")]
    assert [f.cause for f in ordered(found)] == ["stats", "jumps", "latency"]
    explained = ordered([Finding("ignores_images", VERY_LIKELY, ""), Finding("black", VERY_LIKELY, "")])
    assert [(f.cause, f.level) for f in explained] == [("black", VERY_LIKELY), ("ignores_images", POSSIBLE)]


def test_the_page():
    """Without scripts or addresses of other files, with captioned images of now and of training, and ranges."""
    set_up: SetUp = faults.swapped(faults.state_in_degrees(working("velocities")))
    page = to_html(set_up.diagnose())
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:image/png)', page)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions[:4] == ["corner, now", "corner, in training", "wrist, now", "wrist, in training"]
    assert page.count("<img ") == 3 * len(captions)
    assert "degrees and radians" in page and page.count("<rect") >= 6
    for tag in ("section", "table", "figure", "svg", "p", "ul", "div"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_a_served_policy(capsys):
    """The third working set-up: what a server answers is examined as the policy here is, on the same noise."""
    set_up = working("velocities")
    with serve(set_up.policy) as served:
        arguments = ["--server", f"ws://127.0.0.1:{served.port}", "--training", "bundled://metaworld_v30"]
        with pytest.raises(SystemExit) as end:
            main(
                [
                    str(FOLDER / "velocities"),
                    *arguments,
                    "--training-episodes",
                    "0",
                    "4",
                    "8",
                    "--skip",
                    "latency",
                    "jumps",
                ]
            )
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "Nothing found" in printed and "Euler steps: the policy takes none" in printed
    assert re.search(r"blank images +change the actions by \d{2,3}% of their spread", printed)


def test_the_command(tmp_path, capsys):
    """A fault: text, JSON and HTML, and exit code 1."""
    with pytest.raises(SystemExit) as end:
        files = ["--json", str(tmp_path / "d.json"), "--html", str(tmp_path / "d.html")]
        main([str(FOLDER / "velocities"), *DATA, "--num-steps", "1", "--skip", "latency", "jumps", *files])
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "1. very likely: too few Euler steps" in printed and "latency: skipped" in printed
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["findings"][0]["cause"] == "steps" and found["not_judged"]
    assert "Too few Euler steps" in (tmp_path / "d.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data, --env"),
        ([*DATA, "--framework", "jax", "--device", "cpu"], "--device is for PyTorch"),
        ([*DATA, "--replan", "11"], "1 to 10 actions"),
        ([*DATA, "--robot", "aloha"], "aloha|Aloha"),
    ],
)
def test_refused_arguments(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(FOLDER / "velocities"), *arguments])
    assert end.value.code == 1 and re.search(message, capsys.readouterr().err)
