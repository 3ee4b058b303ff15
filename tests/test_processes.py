"""Several processes are one: the same weights, metrics and reports, by data parallelism and with sharded weights, each with the
trajectories of its own samples; and what becomes of them when one fails or is asked to stop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from itertools import filterfalse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
from accelerate.state import AcceleratorState
from filelock import FileLock
from on_processes import CRITICS, INTERRUPTED, OTHERS, WEIGHTS, make, work
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from typed import Beside, command

from tiltflow import processes
from tiltflow.errors import InputError
from tiltflow.processes import shares
from tiltflow.runs.checkpoint import FOLDER, checkpoints, load_checkpoint, verify_checkpoint
from tiltflow.training.records import of_machine

TOGETHER = [f"replicated/{name}" for name in ("methods", "pictures", "interrupted", "not_finite", "critics")]
TOGETHER += ["zero-2/interrupted", "fsdp2/methods", "fsdp2/interrupted"]  # of one launch
TOLERANCE = 1e-6


def launch(function: Callable[..., int | None], *arguments: Any, output: Path) -> Beside:
    """Two processes that do this, by the launcher of torchrun; they and it are copies of this process, which need not import
    everything first."""
    return Beside(launcher, function, *arguments, output=output)


def launcher(*arguments: Any) -> None:
    two = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0)
    elastic_launch(two, worker)(*arguments)


def worker(function: Callable[..., int | None], *arguments: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was copied
    try:
        code = function(*arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        sys.exit(code)


def torchrun(function: object, *words: str, output: Path) -> subprocess.Popen[str]:
    """The command itself, with `python -m tiltflow`."""
    assert function is command
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tiltflow", *words]
    with open(output, "w") as file:
        return subprocess.Popen(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, text=True)


def complete(folder: Path, *names: str) -> None:
    """Let two processes make the scenarios of these names."""
    output = folder.with_name(f"{folder.name}-output")
    assert launch(work, folder, *names, output=output).wait(timeout=300) == 0, output.read_text()[-3000:]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "processes"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make what several tests look at, in whichever of them comes first; after a failure, fail in the others at once."""
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            assert not unfinished.exists(), f"{folder.name}: another test has failed to make it"
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture
def together(shared: Path) -> Path:
    """What two processes make of all scenarios."""
    return made_once(shared / "together", lambda folder: complete(folder, *TOGETHER))


@pytest.fixture
def alone(shared: Path) -> Path:
    """What one process, this one, makes of the scenarios."""
    names = [f"replicated/{scenario}" for scenario in ("methods", "pictures", "interrupted", "critics")]
    return made_once(shared / "alone", lambda folder: make(folder, *names)) / "replicated"


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
    unequal = set() if evaluations else {"network_evaluations"}
    rows = lines(one), lines(other)
    for row, same in zip(*rows, strict=True):
        assert row.keys() == same.keys()
        for key in filterfalse(of_machine, row.keys() - unequal):
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
    "name",
    [
        *(name for name in TOGETHER if name.split("/")[1] not in ("not_finite", "critics")),
        pytest.param("fsdp2/pictures", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_weights_and_metrics_of_one(
    name: str, alone: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every method, with a moving average; pipelines with an adapter and in full, with guidance, a monitor and statistics for
    each prompt, and a batch that two processes cannot share evenly. And a run that goes on from a checkpoint of both."""
    if name in TOGETHER:
        both = request.getfixturevalue("together") / name
    else:
        complete(tmp_path, name)
        both = tmp_path / name
    kept, scenario = name.split("/")
    runs = [path.parent.name for path in (alone / scenario).glob("*/summary.json")]
    assert len(runs) == {"methods": len(OTHERS), "pictures": 3, "interrupted": 4}[scenario]
    for each in runs:
        uneven = scenario == "pictures" or each == "adjoint-matching-bootstrap"  # whose pool has 3 samples
        assert_same_runs(alone / scenario / each, both / each, evaluations=not uneven)
    if scenario == "methods":  # and all processes say the same of a folder that is not free
        said = [(both / f"said-by-{process}").read_text().splitlines() for process in range(2)]
        assert said[0] == said[1]
        of_own = ("adjoint-matching-late", "deterministic-adjoint-matching", "score-as-action-ddpo", "score-as-action-ode")
        for method in of_own:
            whole = int((alone / scenario / f"{method}-stored-by-0").read_text())
            assert {(both / f"{method}-stored-by-{process}").read_text() for process in range(2)} == {str(whole // 2)}
        for words, line in zip(("already holds something", "in use by", "cannot be made"), said[0], strict=True):
            assert words in line
    if scenario == "interrupted":
        for method in INTERRUPTED:
            assert_gone_on_with(both, method, shards=2 if WEIGHTS[kept] else 0)


@pytest.mark.parametrize("name", CRITICS)
def test_two_processes_learn_of_score_as_action_what_one_does(name: str, alone: Path, together: Path) -> None:
    """Each from the trajectories of its own samples: the policy, whatever its gradient is of, and the critic, whatever its loss
    is. In double precision, so that a sample that is counted twice, or a critic of its own, shows."""
    expected = torch.load(alone / "critics" / f"{name}-by-0.pt")
    assert (alone / "critics" / f"{name}-stored-by-0").read_text() == "5"
    for process in range(2):
        found = torch.load(together / "replicated" / "critics" / f"{name}-by-{process}.pt")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert value.isfinite().all()
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=lambda said, key=key: f"{key}: {said}")
        stored = (together / "replicated" / "critics" / f"{name}-stored-by-{process}").read_text()
        assert stored == "3"  # of five, one of them in both; two of the four that are left have room in it


def assert_gone_on_with(folder: Path, method: str, *, shards: int) -> None:
    """Bit for bit, from checkpoints in so many shards, which are whole again for one process."""
    whole, again = folder / method, folder / f"{method}-again"
    ours, theirs = weights(whole), weights(again)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = [[{key: row[key] for key in filterfalse(of_machine, row)} for row in lines(each)] for each in (whole, again)]
    assert rows[0] == rows[1]
    last = checkpoints(whole / FOLDER)[-1]
    assert len([name for name in verify_checkpoint(last)["files"] if name.startswith("shards")]) == shards
    state = load_checkpoint(last)["loop"]
    shapes = {f"model.safetensors {name}": value.shape for name, value in state["parameters"].items()}
    assert shapes == {name: value.shape for name, value in ours.items()}


def test_a_reward_that_is_not_finite_in_one_process_is_not_finite_in_all(together: Path) -> None:
    folder = together / "replicated" / "not_finite"
    said = [(folder / f"said-by-{process}").read_text() for process in range(2)]
    assert said[0] == said[1]
    assert "'samples': [2]" in said[0]  # of the batch of four: the first of the second process
    report = json.loads(next((folder / "adjoint-matching-error" / "diagnostics").rglob("report.json")).read_text())
    assert (report["samples"], report["process"], report["step"]) == ([2], 1, 5)
    for method in ("adjoint-matching", "score-as-action"):
        dropped = [row.get("dropped", 0) for row in lines(folder / f"{method}-drop")]
        assert set(dropped) == {0, 1}


def test_a_process_that_fails_takes_the_others_down(tmp_path: Path) -> None:
    process = launch(work, tmp_path, "replicated/dies", output=tmp_path / "output")
    code = process.wait(timeout=120)
    place = tmp_path / "replicated" / "dies"
    died = float((place / "died").read_text())
    assert code not in (0, None)
    assert "ZeroDivisionError: the reward of process 1 divides by zero" in (tmp_path / "output").read_text()
    assert time.monotonic() - died < 20
    assert not (place / "run" / "summary.json").exists()


@pytest.mark.parametrize("asked", ["one", "all", pytest.param("launcher", marks=pytest.mark.slow)])  # "all" tells it too
def test_asked_to_stop_all_save_and_the_run_goes_on(asked: str, tmp_path: Path) -> None:
    """Whoever hears of it: the launcher, which tells all, a single process, or all of them and the launcher, which tells them
    once more."""
    from tiny import tiny_recipe

    recipe = tiny_recipe(tmp_path, training={"max_train_steps": 2000, "train_batch_size": 4, "checkpointing_steps": 0})
    words = ["train", str(recipe), "--output", str(tmp_path / "run"), "--device", "cpu"]
    process = (torchrun if asked == "launcher" else launch)(command, *words, output=tmp_path / "output")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.1)
    children = [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for pid in {"launcher": [process.pid], "one": children[1:], "all": [*children, process.pid]}[asked]:
        os.kill(pid, signal.SIGTERM)
    process.wait(timeout=60)
    assert "stopped by signal 15" in (tmp_path / "output").read_text()
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


def test_tensors_are_joined_in_order_each_once_by_type_and_up_to_a_length() -> None:
    sizes = [3, 2, 1, 9, 4, 4]
    tensors = [torch.zeros(size, dtype=torch.float64 if i == 5 else torch.float32) for i, size in enumerate(sizes)]
    runs = list(processes._joined(tensors, at_most=5))
    assert [[tensor.numel() for tensor in run] for run in runs] == [[3, 2], [1], [9], [4], [4]]
    assert [id(tensor) for run in runs for tensor in run] == [id(tensor) for tensor in tensors]
    assert [[tensor.numel() for tensor in run] for run in processes._joined(tensors, at_most=100)] == [[3, 2, 1, 9, 4], [4]]
    assert list(processes._joined([])) == []
