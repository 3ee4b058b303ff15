"""Laws and rewards on the line that several tests of laws share."""

from __future__ import annotations

import numpy as np

from tiltflow.laws.law import Array, Law, log_normal

TWO_MODES = Law.of(lambda x: np.logaddexp(log_normal(x, -1.5, 0.5), log_normal(x, 1.5, 0.5)))
NORMAL = Law.of(lambda x: log_normal(x, 0.0, 1.0))
NARROW = Law.of(lambda x: log_normal(x, 0.7, 0.5))


def bowl(x: Array) -> Array:
    """On NORMAL at beta = 1: the tilt is N(0, 1/2)."""
    return -(x**2) / 2


def hill(x: Array) -> Array:
    """On NARROW at beta = 1: the tilt is N(.642857, .142857)."""
    return 1.7 * x - 1.5 * x**2


def line(x: Array) -> Array:
    return x
