"""Transitions: what a file of episodes means, chunks and their returns by hand, and a line for each file that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replays import replay

from tiltflow.errors import InputError
from tiltflow.policies.transitions import load_transitions


def test_chunks_lie_within_an_episode(tmp_path: Path) -> None:
    data = load_transitions(replay(tmp_path / "data.npz", episodes=(4, 2, 3)))
    assert data.last.tolist() == [3, 3, 3, 3, 5, 5, 8, 8, 8]
    assert data.starts(1).tolist() == [0, 1, 2, 4, 6, 7]  # no step begins at the last row of an episode
    assert data.starts(2).tolist() == [0, 1, 6]
    rows = torch.tensor([1, 6])
    expected = torch.stack([torch.cat([data.actions[1], data.actions[2]]), torch.cat([data.actions[6], data.actions[7]])])
    assert torch.equal(data.chunks(rows, 2), expected)


def test_an_episode_that_was_cut_off_ends_with_the_file(tmp_path: Path) -> None:
    data = load_transitions(replay(tmp_path / "data.npz", episodes=(2, 3), terminals=np.array([0, 1, 0, 0, 0])))
    assert data.starts(2).tolist() == [2]


def test_returns_by_hand(tmp_path: Path) -> None:
    """Three steps of rewards 1, 2, 4 at discount 1/2; where the task is over after the second, the third counts no more."""
    rewards, masks = np.array([1.0, 2, 4, 9, 1, 2, 4, 9]), np.array([1, 1, 1, 1, 1, 0, 1, 1])
    path = replay(tmp_path / "data.npz", episodes=(4, 4), rewards=rewards, masks=masks)
    found, weights = load_transitions(path).returns(torch.tensor([0, 4]), 3, 0.5)
    assert found.tolist() == [1 + 2 / 2 + 4 / 4, 1 + 2 / 2]
    assert weights.tolist() == [0.125, 0.0]


def test_bits_are_kept_and_doubles_become_floats(tmp_path: Path) -> None:
    observations = np.arange(8.0).reshape(4, 2)
    data = load_transitions(replay(tmp_path / "data.npz", episodes=(4,), observations=observations))
    assert data.observations.dtype == torch.float32
    assert data.observations.tolist() == observations.tolist()


NAN = np.zeros((4, 3))
NAN[2, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"actions": None}, r"holds observations, terminals, rewards, masks, but no actions"),
        ({"next_observations": np.zeros((4, 3))}, r"has next_observations; in OGBench's files the row after"),
        ({"observations": np.zeros(4)}, r"observations must be numbers \[4 rows, numbers of each\], is float64 \[4\]"),
        ({"observations": np.zeros((4, 8, 8, 3))}, r"observations must be numbers \[4 rows, .*, is float64 \[4, 8, 8, 3\]"),
        ({"actions": np.zeros((3, 2))}, r"actions must be numbers \[4 rows, numbers of each\], is float64 \[3, 2\]"),
        ({"rewards": np.zeros((4, 1))}, r"rewards must be numbers \[4 rows\], is float64 \[4, 1\]"),
        ({"rewards": np.array(["a"] * 4)}, r"rewards must be numbers \[4 rows\], is <U1 \[4\]"),
        ({"observations": NAN}, r"observations of row 2 is not finite"),
        ({"rewards": np.array([0, np.inf, 0, 0])}, r"rewards of row 1 is not finite"),
        ({"masks": np.array([0, 0.5, 1, 1])}, r"masks must be 0 or 1"),
        ({"terminals": np.zeros(4)}, r"terminals is 0 everywhere; it must be 1 at the last row of each episode"),
        ({"rewards": None}, r"has no rewards; a value is learned from the rewards of each step"),
        ({"observations": np.array([{}] * 4, object)}, r"not a readable \.npz file \(Object arrays cannot be loaded"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_a_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = replay(tmp_path / "data.npz", episodes=(4,), **arrays)
    with pytest.raises(InputError, match=message) as caught:
        load_transitions(path, rewards=True)
    assert "\n" not in str(caught.value)


def test_there_must_be_a_file_and_a_chunk(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.npz: no such data set; give an \.npz file of transitions"):
        load_transitions(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(InputError, match=r"bad\.npz: not a readable \.npz file"):
        load_transitions(tmp_path / "bad.npz")
    data = load_transitions(replay(tmp_path / "data.npz", episodes=(4, 3)))
    with pytest.raises(InputError, match="horizon 4: the longest episode has 3 steps"):
        data.starts(4)
