"""Transitions of episodes in an .npz file, as OGBench writes them, and chunks of actions in a row.

Row i has the observation before step i and the action that was taken; the row after it has the observation that followed. The
last row of an episode, where `terminals` is 1, has the last observation alone: no step begins there. To learn a value, a file
has `rewards` too, of each step, and `masks`, 0 where a step has reached a state in which the task is over. Play goes on there,
and the value does not.
"""

# Mutation tests: test_transitions.py

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiltflow.data import UNREADABLE
from tiltflow.errors import InputError

NEEDED, VALUED = ("observations", "actions", "terminals"), ("rewards", "masks")


@dataclass(frozen=True)
class Transitions:
    """Rows of episodes, one after the other.

    Args:
        observations: [rows, observation].
        actions: [rows, action].
        last: for each row the last one of its episode, int64 [rows].
        rewards: of the step of each row [rows]; None where there are none.
        masks: 0 where the task is over after the step, else 1 [rows]; None where there are none.
    """

    observations: Tensor
    actions: Tensor
    last: Tensor
    rewards: Tensor | None = None
    masks: Tensor | None = None

    def to(self, device: torch.device | str) -> Transitions:
        """The same on a device."""
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in vars(self).items()}
        return replace(self, **moved)

    def joined(self, more: Transitions) -> Transitions:
        """These rows, and then those of `more`, which have rewards and masks where these have."""
        return Transitions(
            torch.cat([self.observations, more.observations]),
            torch.cat([self.actions, more.actions]),
            torch.cat([self.last, more.last + len(self.last)]),
            *(
                None if own is None or added is None else torch.cat([own, added])
                for own, added in ((self.rewards, more.rewards), (self.masks, more.masks))
            ),
        )

    def starts(self, horizon: int) -> Tensor:
        """The rows at which `horizon` steps in a row begin, int64 [starts]. Raises InputError if no episode is as long."""
        left = self.last - torch.arange(len(self.last), device=self.last.device)
        if not bool((left >= horizon).any()):
            raise InputError(
                f"horizon {horizon}: the longest episode has {int(left.max())} steps, of which no chunk is so long"
            )
        return (left >= horizon).nonzero()[:, 0]

    def chunks(self, rows: Tensor, horizon: int) -> Tensor:
        """The actions of the `horizon` steps from these rows on, one step after the other: [batch, horizon * action]."""
        return self.actions[_steps(rows, horizon)].flatten(1)

    def squared_distance(self, rows: Tensor, chunks: Tensor) -> Tensor:
        """|a - b|^2 of chunks a [batch, horizon * action], b the actions that were taken from these rows on, over as many steps
        as the episode still has: [batch], 0 at its last row."""
        ours = chunks.unflatten(1, (-1, self.actions.shape[1]))
        steps, last = _steps(rows, ours.shape[1]), self.last[rows, None]
        away = (ours - self.actions[steps.minimum(last)]).square().sum(2)
        return torch.where(steps < last, away, 0).sum(1)

    def returns(self, rows: Tensor, horizon: int, discount: float) -> tuple[Tensor, Tensor]:
        """What the `horizon` steps from these rows on return, R = sum_i discount^i m_i r_i, and what the value of the row after
        them counts, discount^horizon m_horizon: [batch] each. m_i is 1 until the task is over, and 0 from then on.

        Raises InputError for transitions without rewards.
        """
        if self.rewards is None or self.masks is None:
            raise InputError("these transitions have no rewards")
        steps = _steps(rows, horizon)
        after = self.masks[steps].cumprod(1)
        before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
        weights = discount ** torch.arange(horizon, device=rows.device, dtype=after.dtype)
        return (weights * before * self.rewards[steps]).sum(1), discount**horizon * after[:, -1]


def _steps(rows: Tensor, horizon: int) -> Tensor:
    return rows[:, None] + torch.arange(horizon, device=rows.device)


def load_transitions(path: str | Path, *, rewards: bool = False) -> Transitions:
    """Read an .npz file of transitions.

    Args:
        rewards: whether `rewards` and `masks` are needed.

    Raises InputError, of one line, if it cannot be read, lacks an array, or has one that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such data set; give an .npz file of transitions: {', '.join(NEEDED)}")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:  # NumPy leaves a damaged file open
            there = list(archive.files)
            arrays = {name: np.asarray(archive[name]) for name in (*NEEDED, *VALUED) if name in there}
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from None
    for name in NEEDED:
        if name not in arrays:
            raise InputError(f"{path}: holds {', '.join(there)}, but no {name}")
    if "next_observations" in there:
        raise InputError(
            f"{path}: has next_observations; in OGBench's files the row after a step has its next observation, and the last row"
            " of an episode, where terminals is 1, has no step"
        )
    for name in VALUED if rewards else ():
        if name not in arrays:
            raise InputError(f"{path}: has no {name}; a value is learned from the rewards of each step, and masks")
    return _checked(arrays, path)


def _checked(arrays: dict[str, np.ndarray[Any, Any]], path: Path) -> Transitions:
    """Raises InputError for arrays that do not fit each other, or are no numbers."""
    count = len(arrays["observations"]) if arrays["observations"].ndim else 0
    for name, array in arrays.items():
        wanted = 2 if name in ("observations", "actions") else 1
        if array.ndim != wanted or array.dtype.kind not in "fiub" or len(array) != count or 0 in array.shape:
            shape = f"[{count} rows, numbers of each]" if wanted == 2 else f"[{count} rows]"
            raise InputError(f"{path}: {name} must be numbers {shape}, is {array.dtype} {list(array.shape)}")
        finite = np.isfinite(array)
        if not finite.all():
            raise InputError(f"{path}: {name} of row {int(np.argwhere(~finite)[0][0])} is not finite")
    for name in ("terminals", "masks"):
        if name in arrays and not np.isin(arrays[name], (0, 1)).all():
            raise InputError(f"{path}: {name} must be 0 or 1")
    ends = np.flatnonzero(arrays["terminals"])
    if not len(ends):
        raise InputError(f"{path}: terminals is 0 everywhere; it must be 1 at the last row of each episode")
    ends = np.union1d(ends, [count - 1])  # an episode that was cut off
    values = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items() if name != "terminals"}
    return Transitions(**values, last=torch.from_numpy(ends[np.searchsorted(ends, np.arange(count))]))
