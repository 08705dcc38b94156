from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pi0.training.metrics import PROFILED, Window
from pi0_jax.training.metrics import Trace


class Waited:
    """All that a window asks of a loader."""

    waited, read, truncated = 0.0, 0, 0


def test_a_window_counts_its_steps_and_not_what_it_is_paused_for(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    loader = Waited()
    window = Window(loader, batch_size=4)
    window.rows += [{"loss": jnp.float32(1)}, {"loss": jnp.float32(3)}]
    with window.paused():
        now[0] += 7
    now[0] += 2
    loader.waited = 0.5
    means = window.means(lambda steps_per_second: {})
    assert means == {"loss": 2, "samples_per_second": 4, "data_wait": 0.25}
    window.restart()
    now[0] += 1
    window.rows.append({"loss": jnp.float32(np.nan)})
    assert np.isnan(window.means(lambda steps_per_second: {})["loss"])


def test_a_window_reports_examples_whose_text_is_cut(caplog: pytest.LogCaptureFixture):
    loader = Waited()
    window = Window(loader, batch_size=4)
    for _ in range(2):
        window.rows.append({"loss": jnp.float32(1)})
        loader.read, loader.truncated = loader.read + 8, loader.truncated + 2
        assert window.means(lambda steps_per_second: {})["truncated_prompts"] == 0.25
        window.restart()
    (record,) = caplog.records  # once
    assert "the text of 25.0 % of the examples is cut" in record.message
    window.rows.append({"loss": jnp.float32(1)})
    loader.read += 8
    assert "truncated_prompts" not in window.means(lambda steps_per_second: {})


@pytest.mark.parametrize("last", [PROFILED.stop + 1, PROFILED.start + 1])
def test_a_trace_is_written_even_if_the_run_ends_early(last: int, tmp_path: Path):
    with Trace(tmp_path, start=3) as trace:
        for step in range(3, 3 + last):
            trace.before(step)
            trace.after(step, jnp.ones(2) + step)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_no_trace_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with Trace(None, start=0) as trace:
        for step in range(PROFILED.stop):
            trace.before(step)
            trace.after(step, jnp.ones(2))
    assert not list(tmp_path.iterdir())
