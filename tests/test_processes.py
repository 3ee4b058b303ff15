"""Several processes are one: the same weights, metrics and reports, by data parallelism and with sharded weights; and what
becomes of them when one fails or is asked to stop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
from test_resume import METHODS

from tiltflow import processes
from tiltflow.errors import InputError
from tiltflow.processes import shares
from tiltflow.runs.checkpoint import FOLDER, checkpoints, load_checkpoint, verify_checkpoint

HERE = Path(__file__).parent
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResidualBlock"}
ZERO_2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
TOLERANCE = 1e-6


def launch(count: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*launcher, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def complete(count: int, folder: Path, *scenarios: str, **environment: str) -> Path:
    """What `on_processes.py` leaves in `folder`."""
    process = launch(count, str(HERE / "on_processes.py"), str(folder), *scenarios, **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What one process makes of a scenario; made once."""
    return cache(lambda scenario: complete(1, tmp_path_factory.mktemp("alone"), scenario) / scenario)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "model").rglob("*.safetensors"))
    return {f"{path.name} {key}": value for path in files for key, value in load_file(path).items()}


def assert_same_runs(one: Path, other: Path, *, evaluations: bool = True) -> None:
    """Weights, each number of each step and of the looks, and what the summary says, up to rounding."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() != set()
    for name, tensor in a.items():
        assert (tensor - b[name]).abs().max() < TOLERANCE, name
    unequal = {"seconds"} | (set() if evaluations else {"network_evaluations"})
    rows = lines(one), lines(other)
    for row, same in zip(*rows, strict=True):
        assert row.keys() == same.keys()
        for key in row.keys() - unequal:
            # these relative to themselves, however small: they tell whether each sample was counted once
            slack = {"rel_tol": 2e-3} if key in ("gradient_norm", "step_kl") else {"rel_tol": 1e-4, "abs_tol": 1e-5}
            assert math.isclose(row[key], same[key], **slack), (key, row["step"])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for key in ("reward_base", "reward_tuned", "reward_target", "path_kl"):
        if summaries[0][key] is not None:
            assert math.isclose(summaries[0][key], summaries[1][key], rel_tol=1e-4, abs_tol=1e-4), key
    for key in ("best_step", "alarm"):
        assert summaries[0].get(key) == summaries[1].get(key)


@pytest.mark.parametrize(
    ("environment", "scenarios"),
    [
        pytest.param({}, ("methods", "pictures", "interrupted"), id="ddp"),
        pytest.param(SHARDED, ("methods", "interrupted"), id="fsdp2"),
        pytest.param(ZERO_2, ("interrupted",), id="zero-2"),
        pytest.param(SHARDED, ("pictures",), id="fsdp2-pictures", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_weights_and_metrics_of_one(
    environment: dict[str, str], scenarios: tuple[str, ...], alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every method, with a moving average; pipelines with an adapter and in full, with guidance, a monitor and statistics for
    each prompt, and a batch that two processes cannot share evenly. And a run that goes on from a checkpoint of both."""
    together = complete(2, tmp_path / "together", *scenarios, **environment)
    for scenario in scenarios:
        runs = [path.parent.name for path in alone(scenario).glob("*/summary.json")]
        assert len(runs) == {"methods": len(METHODS), "pictures": 3, "interrupted": 4}[scenario]
        for name in runs:
            assert_same_runs(alone(scenario) / name, together / scenario / name, evaluations=scenario != "pictures")
    if "methods" in scenarios:  # and all processes say the same of a folder that is not free
        said = [(together / "methods" / f"said-by-{process}").read_text().splitlines() for process in range(2)]
        assert said[0] == said[1]
        for words, line in zip(("already holds something", "in use by", "cannot be made"), said[0], strict=True):
            assert words in line
    if "interrupted" in scenarios:
        for method in ("adjoint-matching", "score-as-action"):
            assert_gone_on_with(together / "interrupted", method, shards=2 if environment else 0)


def assert_gone_on_with(folder: Path, method: str, *, shards: int) -> None:
    """Bit for bit, from checkpoints in so many shards, which are whole again for one process."""
    whole, again = folder / method, folder / f"{method}-again"
    ours, theirs = weights(whole), weights(again)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [row | {"seconds": 0} for row in lines(whole)] == [row | {"seconds": 0} for row in lines(again)]
    last = checkpoints(whole / FOLDER)[-1]
    assert len([name for name in verify_checkpoint(last)["files"] if name.startswith("shards")]) == shards
    state = load_checkpoint(last)["loop"]
    shapes = {f"model.safetensors {name}": value.shape for name, value in state["parameters"].items()}
    assert shapes == {name: value.shape for name, value in ours.items()}


def test_a_reward_that_is_not_finite_in_one_process_is_not_finite_in_all(tmp_path: Path) -> None:
    complete(2, tmp_path, "not_finite")
    folder = tmp_path / "not_finite"
    said = [(folder / f"said-by-{process}").read_text() for process in range(2)]
    assert said[0] == said[1]
    assert "'samples': [2]" in said[0]  # of the batch of four: the first of the second process
    report = json.loads(next((folder / "adjoint-matching-error" / "diagnostics").rglob("report.json")).read_text())
    assert (report["samples"], report["process"], report["step"]) == ([2], 1, 5)
    for method in ("adjoint-matching", "score-as-action"):
        dropped = [row.get("dropped", 0) for row in lines(folder / f"{method}-drop")]
        assert set(dropped) == {0, 1}


def test_a_process_that_fails_takes_the_others_down(tmp_path: Path) -> None:
    process = launch(2, str(HERE / "on_processes.py"), str(tmp_path), "dies")
    output, _ = process.communicate(timeout=120)
    died = float((tmp_path / "dies" / "died").read_text())
    assert process.returncode != 0
    assert "ZeroDivisionError: the reward of process 1 divides by zero" in output
    assert time.monotonic() - died < 20
    assert not (tmp_path / "dies" / "run" / "summary.json").exists()


@pytest.mark.parametrize("asked", ["launcher", "one", "all"])
def test_asked_to_stop_all_save_and_the_run_goes_on(asked: str, tmp_path: Path) -> None:
    """Whoever hears of it: the launcher, which tells all, a single process, or all of them and the launcher, which tells them
    once more."""
    from tiny import tiny_recipe

    recipe = tiny_recipe(tmp_path, training={"max_train_steps": 2000, "train_batch_size": 4, "checkpointing_steps": 0})
    arguments = ["-m", "tiltflow", "train", str(recipe), "--output", str(tmp_path / "run"), "--device", "cpu"]
    process = launch(2, *arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.1)
    children = [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for pid in {"launcher": [process.pid], "one": children[1:], "all": [*children, process.pid]}[asked]:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "stopped by signal 15" in output
    last = checkpoints(tmp_path / "run" / FOLDER)[-1]
    assert verify_checkpoint(last)["step"] == lines(tmp_path / "run")[-1]["step"] < 2000


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1 is not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported; .*--use_fsdp --fsdp_version 2"),
    ],
)
def test_what_is_not_supported_is_said_before_anything_is_loaded(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=message):
        processes.begin("cpu")


def test_shares_of_several_processes_cover_a_batch_and_count_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 3, 4, 7):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        for size in (1, 2, 5, 6, 12):
            done, counted, calls = set[int](), list[int](), set[tuple[int, ...]]()
            for process in range(count):
                monkeypatch.setattr(processes, "index", lambda process=process: process)
                rows = [i for part in shares(size, 2) for i in range(size)[part]]
                calls.add(tuple(len(range(size)[part]) for part in shares(size, 2)))
                done |= set(rows)
                counted += [i for i in rows if i >= processes.first_counted(size)]
            assert done == set(range(size))
            assert sorted(counted) == list(range(size))
            assert len(calls) == 1  # all call their networks equally often: a sharded one needs them together
