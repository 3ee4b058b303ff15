"""Small data sets of transitions, as OGBench writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def replay(path: Path, *, episodes: Sequence[int] = (12, 12), observation: int = 3, action: int = 2, **arrays: Any) -> Path:
    """Episodes of so many rows, of random observations, and actions that follow them: a = tanh(o_1 +- 1) in each number.

    Args:
        arrays: replace those that are made; None leaves one out.
    """
    rng = np.random.default_rng(0)
    count = sum(episodes)
    terminals = np.zeros(count, np.float32)
    terminals[np.cumsum(episodes) - 1] = 1
    observations = rng.normal(size=(count, observation)).astype(np.float32)
    sign = rng.choice([-1.0, 1.0], (count, 1))
    made: dict[str, Any] = {
        "observations": observations,
        "actions": np.tanh(observations[:, :1] + sign).repeat(action, 1).astype(np.float32),
        "terminals": terminals,
        "rewards": rng.normal(size=count).astype(np.float32),
        "masks": (rng.random(count) > 0.1).astype(np.float32),
    }
    np.savez(path, **{name: value for name, value in (made | arrays).items() if value is not None})
    return path
