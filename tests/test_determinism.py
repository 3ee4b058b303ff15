"""The same numbers as ever: within a run's settings, and from one version of tiltflow to the next."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import METHODS, recipe_for

from tiltflow.runs.run import run
from tiltflow.runs.run_files import read_records
from tiltflow.training.determinism import WORKSPACE, deterministic
from tiltflow.training.records import of_machine

GOLDEN = Path(__file__).parent / "museum" / "golden.json"
"""Metrics of the last step by each method, as hexadecimal floats; written by `python tests/test_determinism.py`."""
SLACK = 1e-3  # processors round differently, and twelve steps of Adam make more of it


def last_metrics(method: str, folder: Path, **training: Any) -> dict[str, float]:
    run(recipe_for(folder, method, **training), folder / "run")
    last = read_records(folder / "run")[-1]
    return {key: float(value) for key, value in last.items() if not of_machine(key)}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, float]]:
    """Metrics of the last step by each method, as a run usually is; trained once."""
    return cache(lambda method: last_metrics(method, tmp_path_factory.mktemp(method)))


def flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    tf32 = torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32
    return (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, *tf32)


def test_everything_that_varies_is_off_in_the_context_and_as_it_was_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = flags()
    with deterministic():
        assert flags() == (True, True, False, False, False)
        assert os.environ[WORKSPACE] == ":4096:8"
    assert flags() == before
    with deterministic(wanted=False):
        assert flags() == before


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("method", METHODS)
def test_a_deterministic_run_has_the_same_bits(method: str, usual: Callable[[str], dict[str, float]], tmp_path: Path) -> None:
    """Every operation of every method has a deterministic kernel on a CPU, and it is the one that is used anyway."""
    assert last_metrics(method, tmp_path, deterministic=True) == usual(method)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_earlier_versions(method: str, usual: Callable[[str], dict[str, float]]) -> None:
    """What changes them changes the results of users: it belongs into the changelog, and then into the file."""
    golden = {key: float.fromhex(value) for key, value in json.loads(GOLDEN.read_text())[method].items()}
    found = usual(method)
    assert found.keys() == golden.keys()
    for key, value in golden.items():
        assert math.isclose(found[key], value, rel_tol=SLACK, abs_tol=SLACK), key


if __name__ == "__main__":
    golden = {}
    for name in METHODS:
        with tempfile.TemporaryDirectory() as place:
            golden[name] = {key: value.hex() for key, value in last_metrics(name, Path(place)).items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    sys.stdout.write(f"{GOLDEN}\n")
