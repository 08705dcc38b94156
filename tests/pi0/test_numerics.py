from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0 import numerics
from tests.compiled import AS_IN_USE


def openpi_euler_times(num_steps: int) -> list[np.float32]:
    """openpi's sampling loop, `while time >= -dt / 2: time += dt`, in float32."""
    dt, time, times = -1.0 / num_steps, np.float32(1), []
    while time >= np.float32(-dt / 2):
        times.append(time)
        time = time + np.float32(dt)
    return times


def test_euler_times_are_openpi_s():
    for num_steps in range(1, 1001):
        expected = openpi_euler_times(num_steps)
        assert len(expected) == num_steps
        times = numerics.euler_times(num_steps)
        assert times.dtype == np.float32
        np.testing.assert_array_equal(times, expected)  # the same float32 sums: bit for bit


def test_no_steps():
    with pytest.raises(ValueError, match="at least 1"):
        numerics.euler_times(0)


def test_frequencies_are_openpi_s():
    """Compiled by XLA, as openpi's training and inference are, at released, golden, tiny and odd sizes."""
    sizes = (1024, 512, 2048, 256, 128, 58, 32, 30, 20, 16, 4, 2)

    @partial(jax.jit, compiler_options=AS_IN_USE)
    def openpi():
        fractions = [jnp.linspace(0.0, 1.0, width // 2) for width in sizes]
        periods = [4e-3 * (4.0 / 4e-3) ** fraction for fraction in fractions]
        exponents = [(2.0 / head_dim) * jnp.arange(head_dim // 2, dtype=jnp.float32) for head_dim in sizes]
        return periods, [10_000**exponent for exponent in exponents]

    # The last bit: XLA's float32 power may be off by one, ours is the rounded float64 one. The rest is the same.
    for size, periods, timescales in zip(sizes, *openpi(), strict=True):
        near = [np.asarray(periods), *(np.nextafter(periods, np.float32(end)) for end in (0, np.inf))]
        frequencies = [np.float32(1.0) / period * np.float32(2) * np.float32(np.pi) for period in near]
        assert (numerics.time_frequencies(size) == frequencies).any(0).all()
        np.testing.assert_array_max_ulp(numerics.rope_timescale(size), np.asarray(timescales), maxulp=1)


def test_time_frequencies_span_the_periods():
    frequencies = numerics.time_frequencies(1024)
    assert frequencies.shape == (512,)
    # Period, 2π, quotient and product are each rounded to float32: four times 6e-8 at most.
    np.testing.assert_allclose(frequencies[[0, -1]], [2 * np.pi / 4e-3, 2 * np.pi / 4.0], rtol=2.4e-7)


def test_rounding():
    assert numerics.rounding("attention_probabilities", "bfloat16") == "bfloat16"
    assert numerics.rounding("attention_logits", "bfloat16") == "float32"
    with pytest.raises(KeyError):
        numerics.rounding("nowhere", "bfloat16")
