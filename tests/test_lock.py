"""One process at a time works in a folder; the next one is told which, and what a dead one has left is taken over."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import tiny_recipe
from typed import Beside, command

from tiltflow.api import evaluate
from tiltflow.errors import InputError, Note
from tiltflow.pretraining.recipe import read_pretraining
from tiltflow.pretraining.run import run_pretraining
from tiltflow.runs.lock import HOLDER, LOCK, Holder, started_of, working_in
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.runs.run_files import read_records
from tiltflow.runs.sweep import sweep
from tiltflow.settings import read_yaml, validate

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children do little


@contextmanager
def holding(folder: Path) -> Iterator[int]:
    """Another process that works in the folder, by its number; killed at the end, so that it gives nothing back."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with working_in(folder):
            os.write(write, b"held")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(read, 4) == b"held"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error, working_in(folder):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_process_is_named_and_a_dead_one_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holding(folder) as process:
        said = refused(folder)
        assert f"process {process} on {socket.gethostname()}" in said
        assert "in use by" in said
    assert (folder / HOLDER).exists()  # nobody was left to take it away
    notes: list[str] = []
    with working_in(folder, notes.append):
        held = Holder.read(folder / HOLDER)
        assert held is not None
        assert (held.process, held.started) == (os.getpid(), started_of(os.getpid()))
        (folder / "kept").touch()
    assert len(notes) == 1
    assert f"process {process} on" in notes[0]
    assert "ended without releasing its lock: it is taken over" in notes[0]
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_the_lock_is_given_back_however_it_ends_and_an_empty_folder_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for error in (ZeroDivisionError, KeyboardInterrupt, InputError):
        with pytest.raises(error):
            work_and_raise(folder, error)
        assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with working_in(folder):
        pass
    assert list((tmp_path / "a").iterdir()) == []  # what was there before stays


def work_and_raise(folder: Path, error: type[BaseException]) -> None:
    with working_in(folder):
        with working_in(folder):  # the evaluation at the end of a run
            pass
        assert (folder / HOLDER).exists()
        raise error


def test_a_thread_is_refused_as_a_process_is(tmp_path: Path) -> None:
    said: list[str] = []
    with working_in(tmp_path / "run"):
        thread = threading.Thread(target=lambda: said.append(refused(tmp_path / "run")))
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in said[0]


def left_by(folder: Path, **changes: object) -> None:
    """A lock that a process left which was killed."""
    folder.mkdir(exist_ok=True)
    (folder / LOCK).touch()
    (folder / HOLDER).write_text(json.dumps(asdict(Holder.this()) | changes))


def test_a_recycled_process_number_is_not_taken_for_the_process(tmp_path: Path) -> None:
    """Where the file system has no locks of its own, the time at which a process started tells it from a later one."""
    parent = os.getppid()
    left_by(tmp_path, process=parent, started=started_of(parent))
    assert "in use by" in refused(tmp_path)
    for changes in ({"process": parent, "started": "1"}, {"process": 2**22 + 1}):  # above what Linux gives
        left_by(tmp_path, **changes)
        with pytest.warns(Note, match="it is taken over"), working_in(tmp_path):
            pass


def test_where_the_file_system_has_no_locks_the_file_says_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("tiltflow.runs.lock.FileLock.acquire", none)
    notes: list[str] = []
    with working_in(tmp_path / "run", notes.append):
        held = Holder.read(tmp_path / "run" / HOLDER)
        assert held is not None
    assert "its file system has no locks (No locks available)" in notes[0]
    assert not (tmp_path / "run").exists()
    parent = os.getppid()
    left_by(tmp_path, process=parent, started=started_of(parent))
    with pytest.warns(Note, match="has no locks"):
        assert "in use by" in refused(tmp_path)


def test_the_lock_of_another_host_is_refused_with_the_command_that_clears_it(tmp_path: Path) -> None:
    folder = tmp_path / "a folder's name"
    left_by(folder, host="node7", process=1, command="tiltflow train")
    said = refused(folder)
    assert "tiltflow train (process 1 on node7, since" in said
    command = said.split("if it is not: ")[1]
    subprocess.run(command, shell=True, check=True)
    with working_in(folder):
        pass


def test_a_job_of_slurm_that_is_requeued_elsewhere_takes_its_own_lock_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    left_by(tmp_path, host="node7")
    assert "rm " in refused(tmp_path)  # another step of the same job, perhaps
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.warns(Note, match="it is taken over"), working_in(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": 1}', "\0" * 100, "[" * 10_000], ids=range(6))
def test_a_damaged_lock_is_nobodys(content: str, tmp_path: Path) -> None:
    (tmp_path / HOLDER).write_text(content)
    with working_in(tmp_path):
        pass


def test_every_command_that_writes_into_a_folder_holds_its_lock(tmp_path: Path) -> None:
    recipe = validate(
        Recipe, read_yaml(tiny_recipe(tmp_path, training={"max_train_steps": 1, "train_batch_size": 4})), "recipe"
    )
    run(recipe, tmp_path / "run")
    (tmp_path / "flow.yaml").write_text("task: flow\nnetwork: unet\n")
    tree = read_yaml(tmp_path / "recipe.yaml")
    attempts = {
        "train": lambda folder: run(recipe, folder),
        "sweep": lambda folder: sweep(tree, {"seed": [0, 1]}, folder),
        "pretrain": lambda folder: run_pretraining(
            read_pretraining(str(tmp_path / "flow.yaml"), []), tmp_path / "none.npz", folder, name="flow"
        ),
        "evaluate": lambda folder: evaluate(tmp_path / "run"),
    }
    for name, attempt in attempts.items():
        folder = tmp_path / ("run" if name == "evaluate" else name)
        with holding(folder) as process, pytest.raises(InputError, match=f"in use by .*process {process} on"):
            attempt(folder)


def test_of_two_that_begin_at_once_one_runs_and_the_other_is_told(tmp_path: Path) -> None:
    """Real processes: one leaves with 2 and one line, the folder is the other one's alone."""
    path = tiny_recipe(tmp_path, training={"max_train_steps": 10, "train_batch_size": 4}, evaluation={"num_samples": 8})
    words = ["train", str(path), "-o", str(tmp_path / "run"), "-q", "--threads", "1"]
    seeds = (3, 4)
    processes = {seed: Beside(command, *words, "--seed", str(seed), output=tmp_path / f"said {seed}") for seed in seeds}
    ended = {seed: process.wait(timeout=120) for seed, process in processes.items()}
    (winner,) = [seed for seed in seeds if ended[seed] == 0]
    loser = sum(seeds) - winner
    said = (tmp_path / f"said {loser}").read_text()
    assert ended[loser] == 2
    assert said.startswith("error: ")
    assert "in use by" in said or "already holds something" in said  # where the first had ended before
    assert said.count("\n") == 1
    assert read_yaml(tmp_path / "run" / "recipe.yaml")["seed"] == winner
    assert [row["step"] for row in read_records(tmp_path / "run")] == list(range(1, 11))
    assert not list((tmp_path / "run").glob(".*"))


def test_a_holder_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tiltflow", "train", "x.yaml", "--set", "reward.url=http://user:secret@host"])
    holder = Holder.this()
    assert str(holder) == f"tiltflow train (process {os.getpid()} on {socket.gethostname()}, since {holder.since})"
    assert "secret" not in json.dumps(asdict(holder))
    assert time.strptime(holder.since, "%Y-%m-%d %H:%M")
