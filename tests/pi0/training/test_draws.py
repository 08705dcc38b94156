from __future__ import annotations

import numpy as np

from pi0.policy.rtc import RTCTraining
from pi0.training.draws import Drawn, Draws
from pi0.variants import get_variant

MODEL = get_variant("tiny")


def test_an_example_has_its_own():
    """A function of seed and position: any rows of any batch."""
    all_of_them, some = Draws(MODEL, 3)(np.arange(8)), Draws(MODEL, 3)(np.array([6, 2]))
    np.testing.assert_array_equal(some.noise, all_of_them.noise[[6, 2]])
    np.testing.assert_array_equal(some.time, all_of_them.time[[6, 2]])
    assert len(np.unique(all_of_them.noise)) == all_of_them.noise.size
    assert not (Draws(MODEL, 4)(np.arange(8)).noise == all_of_them.noise).any()
    repeated = Draws(MODEL, 3, period=4)(np.arange(8))
    np.testing.assert_array_equal(repeated.noise[:4], repeated.noise[4:])


def test_distributions():
    """Beta(1.5, 1)·0.999 + 0.001 and a normal one, within 5 standard errors; delays within 5 of each share."""
    count = 5000
    noise, time, delay = Draws(MODEL, 0, RTCTraining(3, "exponential"))(np.arange(count))
    assert noise.dtype == time.dtype == np.float32 and delay.dtype == np.int32
    assert time.min() >= 0.001 and time.max() <= 1
    assert abs(time.mean() - (0.6 * 0.999 + 0.001)) < 5 * 0.262 / count**0.5
    assert abs(noise.std() - 1) < 5 / (2 * noise.size) ** 0.5
    share = np.bincount(delay, minlength=4) / count
    wanted = RTCTraining(3, "exponential").probabilities()
    assert (abs(share - wanted) < 5 * (wanted * (1 - wanted) / count) ** 0.5).all()


def test_delays_change_no_noise():
    plain, delayed = Draws(MODEL, 0)(np.arange(4)), Draws(MODEL, 0, RTCTraining(2))(np.arange(4))
    np.testing.assert_array_equal(plain.noise, delayed.noise)
    np.testing.assert_array_equal(plain.time, delayed.time)
    assert plain.delay is None and Draws(MODEL, 0, RTCTraining(0))(np.arange(4)).delay is None
    assert Draws(get_variant("tiny_pi0_fast"), 0)(np.arange(4)) == Drawn()
