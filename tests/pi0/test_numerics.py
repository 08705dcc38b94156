from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pi0 import numerics


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 7, 10, 20, 50, 100])
def test_euler_times_are_openpi_s_loop(num_steps: int):
    """`while time >= -dt / 2: time += dt`, in float32: the same number of steps and the same bits."""
    dt, time, times = jnp.float32(-1.0 / num_steps), jnp.float32(1.0), []
    while time >= -dt / 2:
        times.append(time)
        time = time + dt
    np.testing.assert_array_equal(numerics.euler_times(num_steps), np.array(times, np.float32))


def test_no_steps():
    with pytest.raises(ValueError, match="at least 1"):
        numerics.euler_times(0)


@pytest.mark.parametrize("width", [4, 20, 32, 64, 320, 512, 1024])
def test_time_frequencies_are_openpi_s(width: int):
    """Two units in the last place: openpi's power is XLA's, ours is rounded from float64; see `pi0.numerics`."""
    fraction = jnp.linspace(0.0, 1.0, width // 2)
    theirs = np.asarray(1.0 / (4e-3 * (4.0 / 4e-3) ** fraction) * 2 * jnp.pi)
    np.testing.assert_array_max_ulp(numerics.time_frequencies(width), theirs, maxulp=2)


@pytest.mark.parametrize("head_dim", [2, 16, 256])
def test_rope_timescales_are_openpi_s(head_dim: int):
    """One unit in the last place, for XLA's power."""
    theirs = np.asarray(10_000 ** ((2.0 / head_dim) * jnp.arange(head_dim // 2, dtype=jnp.float32)))
    np.testing.assert_array_max_ulp(numerics.rope_timescale(head_dim), theirs, maxulp=1)


def test_rounding():
    assert numerics.rounding("attention_probabilities", "bfloat16") == "bfloat16"
    assert numerics.rounding("attention_logits", "bfloat16") == "float32"
    with pytest.raises(KeyError):
        numerics.rounding("nowhere", "bfloat16")
