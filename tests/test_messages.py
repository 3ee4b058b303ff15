"""What processes of chemistry say to each other comes through to the last bit, and is data alone."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest

from tiltflow.chemistry.messages import read, written
from tiltflow.chemistry.xtb import Answer, Question


@pytest.mark.parametrize("value", [None, True, 3, "Å\n", [], [1, [2.5, None]], (), ("a", (1,)), {}, {"class": {"array": [1]}}])
def test_plain_values_come_through(value: Any) -> None:
    line = written(value)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert read(line) == value
    assert type(read(line)) is type(value)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, np.int64])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (0, 4, 3)])
def test_arrays_come_through_to_the_last_bit(dtype: type, shape: tuple[int, ...]) -> None:
    value = (100 * np.random.default_rng(0).standard_normal(shape) / 3).astype(dtype)
    found = read(written(value))
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert found.tobytes() == value.tobytes()


def test_numbers_that_are_not_finite_come_through() -> None:
    assert math.isnan(read(written(math.nan)))
    assert read(written(np.array([np.inf, -np.inf]))).tolist() == [math.inf, -math.inf]


def test_data_classes_come_through() -> None:
    asked = read(written(Question(np.array([8, 1]), np.full((2, 3), 1 / 3), "gfn2", 7)))
    assert isinstance(asked, Question)
    assert (asked.method, asked.max_iterations, asked.numbers.tolist()) == ("gfn2", 7, [8, 1])
    assert np.array_equal(asked.positions, np.full((2, 3), 1 / 3))
    assert isinstance(read(written((Answer(-1.5, np.zeros((2, 3)), np.zeros(3)), ""))), tuple)


@pytest.mark.parametrize(
    "kind",
    [
        ["os", "system"],
        ["subprocess", "Popen"],
        ["tiltflow.chemistry.workers", "serve"],
        ["tiltflow.chemistry.workers", "Crashed"],
        ["tiltflow.chemistry.xtb", "np"],
    ],
)
def test_a_line_makes_data_classes_of_tiltflow_and_nothing_else(kind: list[str]) -> None:
    with pytest.raises(ValueError, match="is no data class of tiltflow"):
        read(json.dumps({"class": kind, "fields": {}}).encode())
    with pytest.raises(ValueError, match=r"nturl2path\.Nothing is no data class"):
        read(b'{"class": ["nturl2path", "Nothing"], "fields": {}}')
    assert "nturl2path" not in sys.modules  # not even imported
    with pytest.raises(ValueError, match="not a message: anything"):
        read(b'{"anything": 1}')


def test_other_values_are_refused() -> None:
    with pytest.raises(TypeError, match="set cannot be sent to another process"):
        written({1, 2})
