from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from convert.checkpoints import Checkpoint, write_checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0 import __version__
from pi0.assets import Assets
from pi0.parameters import parameters
from pi0.storage import new_folder
from pi0.variants import get_variant
from pi0_eval.parity.command import main
from pi0_eval.parity.html import to_html
from pi0_eval.parity.report import Report, Row

DOCS = Path(__file__).parents[3] / "docs"
SINGLE = ("image tokens", "prefix tokens", "suffix tokens", "prefix out", "suffix out", "velocity", "loss")
VOID = {"meta", "link", "img", "br"}


def row(stage: str, apart: float, allowed: float, proof: float = 1e-15) -> Row:
    return Row(stage, proof, allowed / 2, allowed / 2, apart, allowed)


def report(errors: dict[str, float] | None = None, **changes) -> Report:
    """Two layers of each stack and every single stage, errors of 2e-8 where `errors` says nothing else."""
    layers = tuple(f"{stack} layer {i}" for stack in ("vision", "prefix", "suffix") for i in range(2))
    names = (*layers, *SINGLE, "gradients, all", "gradients, worst parameter", "actions")
    found = dict.fromkeys(names, 2e-8) | (errors or {})
    rows = [row(name, error, 3e-6 if name == "actions" else 1e-5) for name, error in found.items()]
    actions = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    return dataclasses.replace(Report("one", "two", "float32", rows, actions, actions + 0.1), **changes)


class Document(HTMLParser):
    """Elements as (tag, attributes, text), in the order they open; fails where tags do not balance."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs), ""))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for i in self.open:
            tag, attrs, text = self.elements[i]
            self.elements[i] = tag, attrs, text + data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, text) for name, attrs, text in self.elements if name == tag]

    def cell(self, stage: str) -> tuple[str, str]:
        """The class and text of a stage's cell of the heat map."""
        (found,) = [(a["class"], t) for a, t in self.all("td") if (a.get("title") or "").startswith(f"{stage}: ")]
        return found


def test_passed():
    made = report()
    page = Document(to_html(made))
    assert [text for _, text in page.all("h1")] == ["PASSED"]
    text = page.all("body")[0][1]
    assert all(part in text for part in ("one", "two", "float32", f"pi0 {__version__}", "All numbers"))
    for row in made.rows:
        cell_class, cell_text = page.cell(row.stage)
        assert (cell_class, cell_text) == ("in3", "−8")
        assert any(t == row.stage for a, t in page.all("th") if a.get("scope") == "row") or "layer" in row.stage
    assert len([1 for _, t in page.all("td") if t == "ok"]) == len(made.rows)


def test_failed():
    page = Document(to_html(report({"prefix layer 1": 4e-5, "loss": 5e-2, "actions": 2e-6})))
    assert [text for _, text in page.all("h1")] == ["FAILED"]
    assert (
        "first stage out of the budget is prefix layer 1 (4.00e-05 apart, allowed 1.00e-05; 1.00e-15 in float64)"
        in page.all("body")[0][1]
    )
    assert page.cell("prefix layer 0") == ("in3", "−8")
    assert page.cell("prefix layer 1") == ("out0 out", "−5 ✗")
    assert page.cell("loss") == ("out2 out", "−2 ✗")
    assert page.cell("actions") == ("in1", "−6")
    assert len([1 for _, t in page.all("strong") if t == "OUT"]) == 2


def test_another_function():
    """Found in float64, where rounding hides nothing; coloured by its distance from a proof."""
    made = report(rows=[row("loss", 1.0, 1e-5), row("velocity", 2e-8, 1e-5, proof=3e-11)])
    assert made.first_failure.stage == "velocity" and "another function" in made.table()
    page = Document(to_html(made))
    assert page.cell("velocity") == ("out1 out", "−11 ✗")
    assert "first stage that parts is velocity (3.00e-11 in float64)" in page.all("body")[0][1]


@pytest.mark.parametrize(
    ("error", "tolerance", "cell"),
    [
        (0.0, 1e-5, ("in3", "0")),
        (1e-9, 1e-5, ("in3", "−9")),
        (2.5e-6, 1e-5, ("in3", "−6")),
        (5e-6, 1e-5, ("in2", "−6")),
        (7.1e-6, 1e-5, ("in1", "−6")),
        (7.6e-6, 1e-5, ("in0", "−6")),
        (1e-5, 1e-5, ("in0", "−5")),
        (1.001e-5, 1e-5, ("out0 out", "−5 ✗")),
        (5e-4, 1e-5, ("out1 out", "−4 ✗")),
        (1.5, 1e-5, ("out2 out", "0 ✗")),
        (0.0, 0.0, ("in3", "0")),
        (1e-9, 0.0, ("out2 out", "−9 ✗")),
        (math.nan, 1e-5, ("out2 out", "NaN ✗")),
        (math.inf, 1e-5, ("out2 out", "∞ ✗")),
        (1e-9, math.nan, ("out2 out", "−9 ✗")),
    ],
)
def test_colour_of_a_cell(error, tolerance, cell):
    made = report(rows=[row("velocity", error, tolerance)])
    assert Document(to_html(made)).cell("velocity") == cell


def test_actions_are_drawn_over_each_other():
    made = report()
    html = to_html(made)
    figures = html.split('<div class="plots">')[1].split("</div>")[0].split("</svg>")[:-1]
    assert len(figures) == 3
    for i, figure in enumerate(figures):
        assert f"dim {i}: largest difference 1.0e-01" in figure
        lines = dict(re.findall(r'<polyline class="(\w)" points="([^"]+)"', figure))
        points = {k: np.array([p.split(",") for p in v.split()], float) for k, v in lines.items()}
        assert points["a"].shape == points["b"].shape == (5, 2)
        assert (points["a"][:, 1] > points["b"][:, 1]).all()  # B is larger: higher up
        values = np.concatenate([made.actions_a[0, :, i], made.actions_b[0, :, i]]).astype(np.float64)
        low, high = values.min(), values.max()
        drawn = np.concatenate([points["a"], points["b"]])[:, 1]
        np.testing.assert_allclose(drawn, (high - values) / (high - low) * 110, atol=0.051)


def test_padded_dimensions_and_units():
    html = to_html(report(robot_dims=2, normalization="quantile"))
    figures = html.split('<div class="plots">')[1].split("</svg>")
    assert ["padding" in figure for figure in figures[:3]] == [False, False, True]
    assert "Dims from 2 on are padding" in html and "1 % and 99 % quantiles" in html
    assert "padding" not in to_html(report()).split("</style>")[1]
    assert "standard deviation" in to_html(report(normalization="zscore"))


def test_the_failing_row_comes_first():
    lines = report({"loss": 5e-2}).failure().splitlines()
    assert lines[0].startswith("FAILED: other rounding") and lines[3].startswith("loss ") and lines[3].endswith("OUT")
    assert len(lines) > 20


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_leave_gaps(value):
    made = report()
    made.actions_b[0, 2, 0] = made.actions_a[0, 2, 0] = value
    made.actions_b[0, :, 1] = value
    html = to_html(made)
    Document(html)
    assert "dim 0: largest difference not a number, 2 not finite" in html
    assert "dim 1: largest difference not a number, 5 not finite" in html
    points = " ".join(re.findall(r'points="([^"]*)"', html))
    assert "nan" not in points and "inf" not in points


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 4), (2, 50, 32)])
@pytest.mark.parametrize("value", [0.0, 1.0, -3e30])
def test_constant_actions(shape, value):
    """One step, many dims, no range at all: still a line within its frame."""
    actions = np.full(shape, value, np.float32)
    html = to_html(report(actions_a=actions, actions_b=actions))
    page = Document(html)
    lines = [a for a, _ in page.all("polyline") if a["points"] != "0,7 44,7"]
    assert len(lines) == 2 * shape[2]
    for line in lines:
        drawn = np.array([p.split(",") for p in (line["points"] or "").split()], float)
        assert len(drawn) >= 2 and (np.abs(drawn[:, 1] - 55) < 0.1).all()


def test_rounding_alone_does_not_fill_a_plot():
    a = np.full((1, 4, 1), 5.0)
    html = to_html(report(actions_a=a, actions_b=a + 1e-7))
    figure = html.split('<div class="plots">')[1]
    drawn = [float(p.split(",")[1]) for v in re.findall(r'points="([^"]+)"', figure) for p in v.split()]
    assert max(drawn) - min(drawn) < 1


def test_text_is_escaped():
    hostile = "</td><script>alert(1)</script>\"'&amp; <img src=x>"
    rows = [row(f"{hostile} layer 0", 1.0, 1e-5), row(hostile, 1.0, 1e-5)]
    page = Document(to_html(report(a=hostile, b=hostile, dtype=hostile, rows=rows)))
    assert not page.all("script") and not page.all("img")
    assert page.all("body")[0][1].count(hostile) >= 5
    assert page.cell(hostile)[1] == "0 ✗"


def test_nothing_is_loaded():
    html = to_html(report())
    page = Document(html)
    assert {tag for tag, _, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "base", "a"})
    for _, attributes, _ in page.elements:
        assert attributes.keys().isdisjoint({"src", "href", "xlink:href", "srcset", "style", "onload"})
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_actions_are_not_in_the_json():
    values = json.loads(report().to_json())
    assert values.keys() == {"a", "b", "dtype", "passed", "share", "first_failure", "left_out", "stages"}


# ---- the command, and what the documents say


def test_command_writes_both_reports(tmp_path: Path):
    """A changed parameter: exit code 1, and both files are there; no temporary ones."""
    config, rng = get_variant("tiny"), np.random.default_rng(0)
    ours = {n: rng.normal(0, 0.05, p.shape).astype(np.float32) for n, p in parameters(config).items()}
    for name in ("a", "b"):
        checkpoint = Checkpoint(
            Path("memory"), LAYOUTS["pi0_jax"], Assets(config), {n: Tensor.of(x) for n, x in ours.items()}
        )
        with new_folder(tmp_path / name) as folder:
            write_checkpoint(checkpoint, folder, "pi0_torch")
        ours["action_out_proj.bias"] = ours["action_out_proj.bias"] + np.float32(0.1)
    out = tmp_path / "new" / "reports"
    files = [f"--{kind}={out}/r.{kind}" for kind in ("json", "html", "junit", "badge")]
    options = ["--quick", *files]
    with pytest.raises(SystemExit) as stop:
        main([*options, "--", str(tmp_path / "a"), str(tmp_path / "b")])
    assert stop.value.code == 1
    assert sorted(p.name for p in out.iterdir()) == ["r.badge", "r.html", "r.json", "r.junit"]
    assert "gradients, all" not in (out / "r.json").read_text()  # quick
    page = Document((out / "r.html").read_text(encoding="utf-8"))
    assert page.all("h1")[0][1] == "FAILED"
    assert page.cell("velocity")[0].startswith("out") and page.cell("prefix layer 0")[0].startswith("in")
    assert len(page.all("svg")) == 2 + config.action_dim


def test_file_that_cannot_be_written_stops_before_the_work(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["a", "b", "--html", str(tmp_path / "file" / "r.html")])
    assert stop.value.code == 2 and "file" in capsys.readouterr().err


def test_workflow():
    """The workflow parses, pins everything, keeps secrets and inputs out of its commands and always uploads."""
    text = (DOCS / "parity-workflow.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    triggers = workflow[True]  # `on` is a boolean in YAML 1.1
    assert all(triggers[kind]["inputs"].keys() == {"a", "b"} for kind in ("workflow_dispatch", "workflow_call"))
    (job,) = workflow["jobs"].values()
    steps = job["steps"]
    for step in steps:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]) if "uses" in step else "${{" not in step["run"]
        assert "cache" not in step.get("uses", "") and "cache" not in step.get("with", {})
    (compare,) = [step for step in steps if "pi0-parity" in step.get("run", "")]
    assert compare["env"].keys() >= {"A", "B"} and "continue-on-error" not in compare
    (upload,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "always()" and steps.index(upload) > steps.index(compare)
    for file in re.findall(r"--(?:json|html) (\S+)", compare["run"]):
        assert file.startswith(upload["with"]["path"])
    assert workflow["permissions"] == {"contents": "read"}


def test_document_links_and_examples():
    text = (DOCS / "ci.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (DOCS / link).exists(), link
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", text, re.S))
    compile(blocks["python"], "ci.md", "exec")
    assert yaml.safe_load(blocks["yaml"])["jobs"]["parity"]["with"].keys() == {"a", "b"}
