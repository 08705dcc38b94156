from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest

from configs.metaworld_demo import get_config
from pi0.parameters import parameters
from pi0.run_config import RunConfig
from pi0_jax.planning.command import main
from pi0_jax.planning.plan import CHIPS, GIB, TOO_LARGE, parse_topology, plan, report, suggest, table

CONFIG = RunConfig.from_dict(get_config("tiny").to_dict())
ROOT = Path(__file__).parents[3]
OPENPI_GIB = 6.29 + 6.91  # of its own step on v5p:2x2x2, fsdp 8, global batch 64, AdamW and EMA
LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs: pip install libtpu")


def test_a_plan_on_the_cpu():
    """What lies on a device is known by hand: four bytes for each parameter, twice that for Adam."""
    config = dataclasses.replace(CONFIG, batch_size=4)
    model = config.model
    found = plan(config, "gpu:1x80")
    size = 4 * sum(math.prod(p.shape) for p in parameters(model).values())
    assert found.held["parameters"] == found.held["moving average"] == size
    assert 2 * size < found.held["optimizer"] <= 2 * size + 64
    assert found.fits and found.temporaries > 0 and found.cost is not None and not found.cost.collectives
    text = report(found, "tiny")
    assert "it fits" in text and "parameters" in text and "1 devices" in text and "compiled in" in text
    small = dataclasses.replace(found, chip=dataclasses.replace(found.chip, memory=found.total / GIB / 2))
    assert not small.fits and "DOES NOT FIT" in report(small, "tiny") and " no" in table([small])
    cost = dataclasses.replace(found.cost, unknown=Counter(splash=18))
    unknown = dataclasses.replace(found, cost=cost)
    for said in (report(unknown, "tiny"), table([unknown])):
        assert "not among the operations, because their cost is unknown: 18 × splash" in said
    assert "unknown" not in text + table([found])
    config = dataclasses.replace(config, model=model.with_runtime(remat="none"))
    assert suggest(config, small) == [
        "--config.model.runtime.remat=full",
        "--config.accumulate=2",
        "--config.optimizer.moments_dtype=bfloat16",
    ]


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v7:2x2", "gpu:8", "gpu:ax80", "v5p:2x2x"])
def test_no_topology(name: str, capsys):
    with pytest.raises(ValueError, match="topology is"):
        parse_topology(name)
    with pytest.raises(SystemExit) as stop:
        main(["--config", "configs/metaworld_demo.py", "--topology", name])
    assert stop.value.code == 1 and "topology is" in capsys.readouterr().err


def test_topologies():
    assert parse_topology("v5p:2x2x2") == ("v5p", CHIPS["v5p"], 0)
    assert parse_topology("v7x:2x2x1") == parse_topology("tpu7x:2x2x1") == ("v7x", CHIPS["v7x"], 0)
    generation, chip, number = parse_topology("gpu:8x80")
    assert (generation, number) == ("gpu", 8) and chip.memory == pytest.approx(74.5, abs=0.01)
    with pytest.raises(ValueError, match="virtual devices"):
        plan(CONFIG, f"gpu:{len(jax.devices()) + 1}x80")


@LIBTPU
def test_the_devices_of_chips():
    """v4's two cores are one device, v7x's are two."""
    script = (
        "from pi0_jax.planning.plan import devices_of, prepare\n"
        "names = ['v4:2x2x1', 'v5e:4x4', 'v5p:2x2x2', 'v6e:4x4', 'v7x:2x2x1']\n"
        "prepare(names)\n"
        "print([len(devices_of(name)) for name in names])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.split("\n")[-2] == "[4, 16, 8, 16, 8]", result.stderr


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("Used 17.09G of 15.75G hbm. Exceeded hbm capacity by 1.34G.", ("17.09", "G", "15.75")),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (608.00G) exceeds available HBM "
            "(15.75G).",
            ("608.00", "G", "15.75"),
        ),
    ],
)
def test_what_libtpu_says_of_too_large_programs(message: str, found: tuple[str, ...]):
    matches = [match for pattern in TOO_LARGE if (match := re.search(pattern, message))]
    assert [match.groups() for match in matches] == [found]


def planned(*flags: str) -> list[str]:
    script = "from pi0_jax.planning.command import main; main()"
    command = [sys.executable, "-c", script, "--config", "pi0_metaworld", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "fsdp", "most"),
    [("v5p:2x2x2", 8, OPENPI_GIB), ("v5e:4x4", 16, CHIPS["v5e"].memory)],
)
def test_the_full_model_fits(topology: str, fsdp: int, most: float):
    """Minutes each. Everything of a layer is recomputed and nothing else, as in openpi's step."""
    flags = ("--config.batch_size=64", "--config.model.action_horizon=50", f"--config.mesh.fsdp={fsdp}")
    lines = planned("--topology", topology, *flags)
    everything = next(float(line.split()[1]) for line in lines if line.split()[:1] == ["all"])
    assert everything <= most and any("it fits" in line for line in lines)


@LIBTPU
@pytest.mark.slow
def test_more_chips_do_not_compute_more_each():
    flags = ("--batch-per-chip", "8", "--config.mesh.fsdp=16")
    rows = [line.split() for line in planned("--topology", "v5e:4x4", "v5p:4x8x8", *flags)[1:]]
    few, many = (float(row[6]) for row in rows)
    assert abs(many / few - 1) <= 0.05
