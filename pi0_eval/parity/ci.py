"""A comparison's result in the forms that CI systems and READMEs read: JSON, JUnit XML, a badge."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from pi0_eval.parity.report import Report, Row, numbers

# What XML 1.0 cannot hold, not even escaped.
NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
GREEN, RED = "#1b6e2e", "#9c1c2e"


def to_json(reports: Mapping[str, Report]) -> str:
    """One report as `Report.to_json`; several, by how B is run, in `reports`, with `passed` of all."""
    if len(reports) == 1:
        return next(iter(reports.values())).to_json()
    values = {side: json.loads(report.to_json()) for side, report in reports.items()}
    return json.dumps({"passed": all(r.passed for r in reports.values()), "reports": values}, indent=2)


def to_junit(reports: Mapping[str, Report]) -> str:
    """JUnit XML, as GitHub's test reporters, GitLab and Jenkins read it.

    A suite for each way to run B, a test case for each stage, in order; a stage that is out is a failure, whose text is
    the report's table. The sums of tests and failures stand on every level.
    """
    suites = ElementTree.Element("testsuites", name="pi0-parity")
    total = failed = 0
    for side, report in reports.items():
        out = sum(not row.passed for row in report.rows)
        total, failed = total + len(report.rows), failed + out
        name = f"parity in {report.dtype}" if len(reports) == 1 else f"parity in {report.dtype}, B as {side}"
        counts: dict[str, Any] = {"tests": str(len(report.rows)), "failures": str(out), "errors": "0", "skipped": "0"}
        suite = ElementTree.SubElement(suites, "testsuite", name=_xml(name), **counts)
        properties = ElementTree.SubElement(suite, "properties")
        for key, value in (("a", report.a), ("b", report.b), ("dtype", report.dtype), ("verdict", report.verdict)):
            ElementTree.SubElement(properties, "property", name=key, value=_xml(value))
        for row in report.rows:
            _add_case(suite, name, row, report)
    suites.attrib |= {"tests": str(total), "failures": str(failed), "errors": "0"}
    ElementTree.indent(suites)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suites, encoding="unicode")}\n'


def _add_case(suite: ElementTree.Element, name: str, row: Row, report: Report) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_xml(name), name=_xml(row.stage))
    if row.passed:
        return
    kind = "rounding" if row.proved else "another function"
    failure = ElementTree.SubElement(case, "failure", type=kind, message=_xml(f"{row.stage}: {numbers(row)}"))
    if row is report.first_failure:  # the others follow from it
        failure.text = _xml(report.table())


def to_badge(reports: Mapping[str, Report]) -> str:
    """JSON of a shields.io endpoint badge (https://shields.io/badges/endpoint-badge).

    The message names dtype and verdict: "proved, float32", or the first stage that is out.
    """
    dtypes = ", ".join(dict.fromkeys(report.dtype for report in reports.values()))
    failures = [report.first_failure for report in reports.values() if report.first_failure is not None]
    if failures:
        message = f"out: {failures[0].stage}"
    else:
        ways = f", {len(reports)} ways" if len(reports) > 1 else ""
        message = f"proved, {dtypes}{ways}"
    color = RED if failures else GREEN
    values = {"schemaVersion": 1, "label": "parity", "message": message, "color": color, "isError": bool(failures)}
    return json.dumps(values, indent=2)


def _xml(text: str) -> str:
    """Text without characters that XML cannot hold."""
    return NO_XML.sub("\ufffd", text)
