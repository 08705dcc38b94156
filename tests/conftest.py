"""What every test runs under: which tests are skipped, and how JAX and PyTorch are set up.

Set through the environment before either framework is imported, so that tests which need neither import
neither, and processes started by a test inherit it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import hypothesis
import pytest

import tests.bucket

hypothesis.settings.register_profile("seeded", derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("seeded")

OPT_IN = ("slow", "gpu", "network", "sim", "peers")


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker in OPT_IN:
        parser.addoption(f"--run-{marker}", action="store_true", help=f"run the tests marked {marker}")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--run-gpu"):
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")  # see compiled.py
    if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker, PyTorch's too
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in OPT_IN:
        if not config.getoption(f"--run-{marker}"):
            skip = pytest.mark.skip(reason=f"marked {marker}: runs with --run-{marker}")
            for item in items:
                if item.get_closest_marker(marker):  # not in `keywords`, which has the names of folders too
                    item.add_marker(skip)


@pytest.fixture
def highest_precision() -> Iterator[None]:
    """Matrix products of JAX in full float32, for tests that compare numbers closely."""
    jax = pytest.importorskip("jax")
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[tests.bucket.Proxy]:
    with tests.bucket.server() as proxy:
        yield proxy


@pytest.fixture
def bucket(bucket_server: tests.bucket.Proxy, request: pytest.FixtureRequest) -> tests.bucket.Bucket:
    """A folder of its own in a bucket on this machine."""
    return tests.bucket.Bucket(bucket_server, re.sub(r"\W+", "-", request.node.name))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a bucket of S3's interface on this machine."""
    with tests.bucket.s3_server() as address:
        yield address
