"""Constants and roundings that the two frameworks share, defined once.

The frequencies below are computed here in NumPy, not in each framework: a last-bit difference in a frequency is
multiplied by 2π·t/4e-3 ≈ 1571 rad before the sine, so two correct `pow` implementations would already differ by 1e-4.
"""

from __future__ import annotations

import numpy as np

LAYER_NORM_EPS = 1e-6  # SigLIP
RMS_NORM_EPS = 1e-6  # Gemma
LORA_INIT_STDDEV = 0.01  # of both factors, as in openpi
MASKED_LOGIT = -2.3819763e38  # attention logit of a masked token
ROPE_BASE = 10_000.0
TIME_PERIODS = (4e-3, 4.0)  # shortest and longest period of the flow time's embedding
TIME_BETA = (1.5, 1.0)  # in training t = Beta(1.5, 1)·0.999 + 0.001
TIME_SCALE, TIME_OFFSET = 0.999, 0.001
EOS_TOKEN = 1  # ends a text: PaliGemma's vocabulary

FLOAT32 = "float32"
COMPUTE = "compute"

# Where a value is kept in float32 and where it is rounded to the compute dtype (bfloat16 in training and on robots).
# In float64, in which parity is proved, all of them are float64; constants and tables stay as rounded below.
ROUNDING = {
    "patches": FLOAT32,  # patch convolution + position embedding; rounded after their sum
    "norm": FLOAT32,  # statistics, scale and shift of every norm; rounded after them
    "rope": FLOAT32,  # rotation of queries and keys; rounded after it
    "queries": COMPUTE,  # rotated, of π0 and π0.5
    "fast_queries": FLOAT32,  # rotated, of π0-FAST, whose keys are rounded nevertheless
    "attention_logits": FLOAT32,  # accumulated, masked and put through the softmax
    "attention_probabilities": COMPUTE,  # rounded before they weigh the values
    "residual": FLOAT32,  # sums within a layer; rounded after its last one
    "action_residual": FLOAT32,  # those between the layers of the action expert, whose tokens are few, and its output
    "activation": FLOAT32,  # inside GELU; rounded after it
    "time": FLOAT32,  # flow time, its embedding and π0.5's condition
    "action_projections": FLOAT32,  # state, action and time projections, and the velocity they give
}


def rounding(place: str, dtype: str) -> str:
    """The dtype name a value has at `place` of `ROUNDING` when the model computes in `dtype`."""
    return dtype if ROUNDING[place] == COMPUTE else at_least_float32(dtype)


def at_least_float32(dtype: str) -> str:
    """The name of the wider dtype of this one and float32: of sums, norms, logits and losses."""
    return "float64" if dtype == "float64" else FLOAT32


def rope_timescale(head_dim: int) -> np.ndarray:
    """RoPE's timescales, float32 [head_dim/2]: the angle of position p is p / timescale."""
    exponents = np.float32(2.0 / head_dim) * np.arange(head_dim // 2, dtype=np.float32)
    return np.power(ROPE_BASE, exponents.astype(np.float64)).astype(np.float32)


def time_frequencies(width: int, periods: tuple[float, float] = TIME_PERIODS) -> np.ndarray:
    """Angular frequencies of the flow time's embedding, float32 [width/2] (openpi `posemb_sincos`).

    `periods`: the shortest and the longest.

    The fractions are i · fl32(1/(n−1)), as XLA computes `jnp.linspace` with which the released models were trained.
    """
    shortest, longest = periods
    count = width // 2
    fraction = np.arange(count, dtype=np.float32) * np.float32(1 / max(count - 1, 1))
    fraction[1:][-1:] = 1  # the last of two or more is exact
    period = np.float32(shortest) * np.power(longest / shortest, fraction.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / period * np.float32(2 * np.pi)


def euler_times(num_steps: int) -> np.ndarray:
    """Flow times of the Euler steps from noise (t = 1) to actions, float32 [num_steps].

    Summed one float32 step at a time, as openpi's sampling loop does. Raises ValueError for fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; sampling needs at least 1 Euler step")
    times = np.ones(num_steps, np.float32)
    for i in range(1, num_steps):
        times[i] = times[i - 1] + np.float32(-1.0 / num_steps)
    return times
