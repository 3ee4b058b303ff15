"""A run that goes on is the run that never stopped, bit for bit: every method, after a real SIGKILL, after a signal."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import multiprocessing.context
import os
import pty
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor
from typed import Beside, command

from tiltflow.errors import InputError, Interrupted
from tiltflow.evaluation.monitor import read_looks
from tiltflow.runs.checkpoint import FOLDER, checkpoints, load_checkpoint, save_checkpoint
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.runs.run_files import read_records
from tiltflow.runs.run_folder import RunFolder
from tiltflow.settings import dump_yaml, read_yaml, validate
from tiltflow.training.records import of_machine
from tiltflow.training.signals import noted

SHORT = {"num_inference_steps": 4}
RATE = {"learning_rate": 1e-3}
CRITIC = {"num_steps": 2, "train_batch_size": 2}
METHODS: dict[str, dict[str, Any]] = {
    "adjoint-matching": {"beta": 0.1, "num_passes": 2, "drop_quantile": 0.8, "train_timesteps": [{"count": 2}]},
    "adjoint-matching-bootstrap": {"name": "adjoint-matching", "beta": 0.1, "bootstrap": 0.5, "pool": {"tail": 3}},
    "adjoint-matching-late": {
        "name": "adjoint-matching",
        "beta": 0.1,
        "control_from": 0.4,
        "num_passes": 2,
        "reweight_passes": True,
        "control_variate": True,
    },
    "endpoint-adjoint-matching": {"beta": 0.1, "num_passes": 2},
    "score-as-action": {"critic": CRITIC, "num_passes": 3, "train_timesteps": [{"count": 2}]},
    "score-as-action-ddpo": {"name": "score-as-action", "preset": "ddpo", "num_passes": 2},
    "score-as-action-ode": {"name": "score-as-action", "solver": "euler", "critic": CRITIC | {"form": "cos-sin"}},
    "orw-cfm-w2": {"alpha": 0.3, "num_passes": 3, "min_effective_sample_size": 1},
    "tilt-matching": {"num_passes": 3, "min_effective_sample_size": 1, "replay": 2},
    "tilt-matching-rounds": {
        "name": "tilt-matching",
        "preset": "implicit",
        "batches_per_round": 2,
        "num_passes": 1,
        "min_effective_sample_size": 1,
    },
    "path-reweighted": {"num_passes": 2, "path_steps": 4, "neighbours": 3, "min_effective_sample_size": 1},
    "vgg-flow": {"beta": 0.1},
    "diffusion-nft": {"num_passes": 2, "old_decay_rate": 0.2},
    "rwr": {"num_passes": 1, "proposal": "tuned", "batches_per_round": 2},
    "dxmi": {"critic": CRITIC, "num_passes": 2},
    "orw-cfm-w2-offline": {"name": "orw-cfm-w2", "online_fraction": 0.5, "num_passes": 2, "min_effective_sample_size": 1},
}
TRAINING = {
    "max_train_steps": 12,
    "train_batch_size": 4,
    "ema_decay": 0.5,
    "checkpointing_steps": 3,
    "monitor": {"steps": 2, "num_samples": 8},
    "non_finite_rewards": "drop",
}
NO_JUDGE = {"num_samples": 8, "grid": 4, "batch_size": 8}


def recipe_for(folder: Path, method: str, **training: Any) -> Recipe:
    settings = {"name": method} | SHORT | METHODS[method]
    optimizer = RATE | ({"lr_scheduler": "constant"} if method == "adjoint-matching-bootstrap" else {})
    path = tiny_recipe(folder, method=settings, optimizer=optimizer, training=TRAINING | training, evaluation=NO_JUDGE)
    return validate(Recipe, read_yaml(path), "recipe")


def resuming(recipe: Recipe, wanted: str = "latest") -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"resume_from_checkpoint": wanted})})


class Killed(BaseException):
    """Stands for the end of the process where a test stays in its own."""


def killed_after(count: int) -> Any:
    def watch(record: Any) -> None:
        if record.step >= count:
            raise Killed

    return watch


def final(folder: Path) -> dict[str, Any]:
    """The last checkpoint, but for the clock."""
    last = checkpoints(folder / FOLDER)[-1]
    found = load_checkpoint(last)["loop"]
    assert found.pop("seconds") > 0
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not of_machine(key)} for row in read_records(folder)]


def same(one: Any, other: Any, path: str = "") -> None:
    """Equal to the last bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{path}/{i}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def same_runs(one: Path, other: Path) -> None:
    same(final(one), final(other))
    assert rows(one) == rows(other)
    assert read_looks(one) == read_looks(other)
    for name in ("model/model.safetensors", "best/model.safetensors", "before.png", "after.png"):
        assert (one / name).exists() == (other / name).exists()
        assert not (one / name).exists() or (one / name).read_bytes() == (other / name).read_bytes(), name
    if not (one / "summary.json").exists():
        return
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    ours, theirs = ({k: v for k, v in each.items() if k != "name" and not of_machine(k)} for each in (ours, theirs))
    assert ours == theirs


# ---- contract 4: bitwise resume ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("unmeasured")
def test_resume_is_bitwise(method: str, tmp_path: Path) -> None:
    """Stopped anywhere: at a checkpoint, between two, in the middle of the steps on a batch; and more than once."""
    recipe = recipe_for(tmp_path, method)
    run(recipe, tmp_path / "whole")
    for count in (5, 8, 11):
        with pytest.raises(Killed):
            run(resuming(recipe), tmp_path / "parts", callbacks=[killed_after(count)])
    run(resuming(recipe), tmp_path / "parts")
    same_runs(tmp_path / "whole", tmp_path / "parts")
    assert [row["step"] for row in rows(tmp_path / "parts")] == list(range(1, 13))


@pytest.mark.parametrize(
    "training",
    [
        {"micro_batch_size": 2, "ema_decay": 0.0},
        {"calibration_samples": 256},
        {"target_kl": 0.2},
        {"trainable": "middle"},
        {"checkpointing_steps": 1, "checkpoints_total_limit": 1},
        {"report_to": "tensorboard", "calibration_samples": 256, "micro_batch_size": 2, "deterministic": True},
    ],
    ids=lambda training: next(iter(training)),
)
@pytest.mark.usefixtures("unmeasured")
def test_resume_is_bitwise_with(training: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adjoint-matching", **training)
    run(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        run(resuming(recipe), tmp_path / "parts", callbacks=[killed_after(8)])
    run(resuming(recipe), tmp_path / "parts")
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("unmeasured")
def test_resume_is_bitwise_where_samples_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sometimes.py").write_text(
        "import torch\n"
        "def reward(x):\n"
        "    values = x.mean((1, 2, 3))\n"
        "    return torch.where((values * 1e4).frac().abs() > 0.95, torch.nan, values)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"name": "adjoint-matching"} | SHORT | METHODS["adjoint-matching"]
    training = TRAINING | {"monitor": None, "train_batch_size": 8}  # a look has no samples to spare
    reward = {"name": "function", "path": "sometimes:reward"}
    path = tiny_recipe(tmp_path, method=settings, training=training, evaluation=NO_JUDGE, reward=reward)
    recipe = validate(Recipe, read_yaml(path), "recipe")
    run(recipe, tmp_path / "whole")
    assert any(row.get("dropped") for row in rows(tmp_path / "whole")[6:])
    with pytest.raises(Killed):
        run(resuming(recipe), tmp_path / "parts", callbacks=[killed_after(8)])
    run(resuming(recipe), tmp_path / "parts")
    same_runs(tmp_path / "whole", tmp_path / "parts")


def test_resume_is_bitwise_with_a_reward_that_learns(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (16, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=np.arange(16) % 2, x_test=images, y_test=np.arange(16) % 2)
    network = {"name": "residual-classifier", "channels": [8, 8], "classes": 1}
    reward = {"name": "energy", "data": str(tmp_path / "data.npz"), "network": network}
    method = {"name": "dxmi", "critic_warmup_steps": 2} | SHORT
    training = TRAINING | {"monitor": None}  # the reward of one look is not that of another
    path = tiny_recipe(tmp_path, method=method, training=training, evaluation=NO_JUDGE, reward=reward)
    recipe = validate(Recipe, read_yaml(path), "recipe")
    run(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        run(resuming(recipe), tmp_path / "parts", callbacks=[killed_after(8)])
    run(resuming(recipe), tmp_path / "parts")
    same_runs(tmp_path / "whole", tmp_path / "parts")
    assert "reward" in final(tmp_path / "parts")


@pytest.mark.usefixtures("unmeasured")
def test_a_run_that_is_finished_is_only_evaluated_again(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adjoint-matching")
    run(recipe, tmp_path / "run")
    before = rows(tmp_path / "run"), final(tmp_path / "run"), (tmp_path / "run/model/model.safetensors").read_bytes()
    run(resuming(recipe), tmp_path / "run")
    same(before[1], final(tmp_path / "run"))
    assert (rows(tmp_path / "run"), (tmp_path / "run/model/model.safetensors").read_bytes()) == (before[0], before[2])


@pytest.mark.usefixtures("unmeasured")
def test_a_run_is_made_longer(tmp_path: Path) -> None:
    """With a constant learning rate, to the bit the longer one from the start."""
    short = recipe_for(tmp_path, "adjoint-matching-bootstrap")
    longer = recipe_for(tmp_path, "adjoint-matching-bootstrap", max_train_steps=16)
    run(short, tmp_path / "run")
    run(resuming(longer), tmp_path / "run")
    run(longer, tmp_path / "whole")
    same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.usefixtures("unmeasured")
def test_the_newest_checkpoint_that_verifies_is_taken_and_the_others_named(tmp_path: Path) -> None:
    recipe, notes = recipe_for(tmp_path, "adjoint-matching"), list[str]()
    run(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        run(resuming(recipe), tmp_path / "parts", callbacks=[killed_after(11)])
    newest = checkpoints(tmp_path / "parts" / FOLDER)[-1]
    (newest / "state.json").unlink()
    run(resuming(recipe), tmp_path / "parts", note=notes.append)
    assert any(note.startswith("skipped") and newest.name in note for note in notes)
    assert any(note.startswith("resuming from step-") for note in notes)
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("unmeasured")
def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    recipe, notes = recipe_for(tmp_path, "orw-cfm-w2"), list[str]()
    run(resuming(recipe), tmp_path / "whole", note=notes.append)
    assert "a new one begins" in notes[0]
    with pytest.raises(Killed):
        run(resuming(recipe), tmp_path / "parts", callbacks=[killed_after(2)])
    assert not (tmp_path / "parts" / FOLDER).exists()
    run(resuming(recipe), tmp_path / "parts", note=notes.append)
    assert "the run starts over" in notes[-1]
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("unmeasured")
def test_a_changed_recipe_lists_the_differences(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adjoint-matching")
    run(recipe, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    def refused(**changes: Any) -> str:
        tree = recipe.model_dump(mode="json")
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = tree
            for parent in parents:
                node = node[parent]
            node[last] = value
        with pytest.raises(InputError) as error:
            run(resuming(validate(Recipe, tree, "recipe")), tmp_path / "run")
        return str(error.value)

    assert "method.beta 0.1 -> 0.2" in (text := refused(method__beta=0.2, seed=3))
    assert "seed 0 -> 3" in text
    assert "its learning rate depends on it" in refused(training__max_train_steps=20)
    assert "reward.classes" in refused(reward__classes=[1])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    tree = recipe.model_dump(mode="json")
    tree["evaluation"]["num_samples"], tree["training"]["checkpointing_steps"], tree["description"] = 10, 5, "other"
    run(resuming(validate(Recipe, tree, "recipe")), tmp_path / "run")  # changes nothing that is computed in training


@pytest.mark.usefixtures("unmeasured")
def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adjoint-matching")
    run(recipe, tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    tree = read_yaml(path)
    del tree["training"]["deterministic"], tree["method"]["bootstrap"]
    path.write_text(dump_yaml(tree))
    with RunFolder.begin(tmp_path / "run", resuming(recipe)) as place:
        assert place.state is not None
    bootstrapped = recipe.model_copy(update={"method": recipe.method.model_copy(update={"bootstrap": 0.5})})
    with (
        pytest.raises(InputError, match=r"method\.bootstrap 0\.0 -> 0\.5"),
        RunFolder.begin(tmp_path / "run", resuming(bootstrapped)),
    ):
        pass


@pytest.mark.usefixtures("unmeasured")
def test_a_checkpoint_by_name(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adjoint-matching", checkpoints_total_limit=None)
    run(recipe, tmp_path / "run")
    expected = rows(tmp_path / "run"), final(tmp_path / "run")
    names = [folder.name for folder in checkpoints(tmp_path / "run" / FOLDER)]
    assert len(names) == 4
    run(resuming(recipe, names[1]), tmp_path / "run")
    assert rows(tmp_path / "run") == expected[0]
    same(final(tmp_path / "run"), expected[1])
    with (
        pytest.raises(InputError, match=f"has no checkpoint 'step-99'; it has {names[0]}"),
        RunFolder.begin(tmp_path / "run", resuming(recipe, "step-99")),
    ):
        pass


@pytest.mark.usefixtures("unmeasured")
def test_another_machine_is_named(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adjoint-matching")
    run(recipe, tmp_path / "run")
    last = checkpoints(tmp_path / "run" / FOLDER)[-1]
    saved = load_checkpoint(last)
    threads = saved["environment"]["threads"]
    save_checkpoint(last.parent, 13, saved | {"environment": saved["environment"] | {"threads": threads + 1}})
    notes: list[str] = []
    with RunFolder.begin(tmp_path / "run", resuming(recipe), notes.append):
        pass
    assert notes[0] == f"threads was {threads + 1}, now {threads}: the same numbers up to rounding, but not bit for bit"


@pytest.mark.usefixtures("unmeasured")
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adjoint-matching")
    run(recipe, tmp_path / "run")
    last = checkpoints(tmp_path / "run" / FOLDER)[-1]
    saved = load_checkpoint(last)
    name, weight = next(iter(saved["loop"]["parameters"].items()))
    saved["loop"]["step"] = 1
    saved["loop"]["parameters"][name] = weight.flatten()
    save_checkpoint(last.parent, 13, saved)
    with pytest.raises(InputError, match=rf"resume: {name} is of shape"):
        run(resuming(recipe), tmp_path / "run")
    del saved["loop"]["parameters"][name]
    save_checkpoint(last.parent, 14, saved)
    with pytest.raises(InputError, match=f"resume: the checkpoint has no .* {name}; is it from another model?"):
        run(resuming(recipe), tmp_path / "run")


# ---- contract 11: signals, in every loop ----


def stopping(monkeypatch: pytest.MonkeyPatch, stop: Callable[[], int | None]) -> None:
    """`stop` in place of real signals."""
    monkeypatch.setattr("tiltflow.runs.run_folder.noted", lambda heard, echo: nullcontext(stop))


@pytest.mark.parametrize("method", ["adjoint-matching", "score-as-action", "orw-cfm-w2"])
@pytest.mark.usefixtures("unmeasured")
def test_stopped_at_any_evaluation_of_a_network_it_saves_and_goes_on_bitwise(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes at another network evaluation each time: while trajectories are drawn, adjoints computed, a critic
    or the policy learns."""
    recipe = recipe_for(tmp_path, method, checkpointing_steps=0)
    run(recipe, tmp_path / "whole")
    stops, asked = 0, 0

    def stop() -> int | None:
        nonlocal asked
        asked -= 1
        return signal.SIGTERM if asked < 0 else None

    stopping(monkeypatch, stop)
    for patience in itertools.count(4):
        asked = patience
        try:
            run(resuming(recipe), tmp_path / "parts", handle_signals=True)
            break
        except Interrupted as error:
            stops += error.signal == signal.SIGTERM
            # in the very first batch there is nothing to save, and nothing is written
            assert (tmp_path / "parts").exists() == (tmp_path / "parts" / "model" / "model.safetensors").exists()
    assert stops > 3
    same_runs(tmp_path / "whole", tmp_path / "parts")


def test_stopped_after_the_last_step_it_leaves_before_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tmp_path, "orw-cfm-w2")
    metrics = tmp_path / "run" / "metrics.jsonl"

    def stop() -> int | None:
        return signal.SIGTERM if metrics.exists() and len(rows(tmp_path / "run")) == 12 else None

    stopping(monkeypatch, stop)
    with pytest.raises(Interrupted, match="training is complete; stopped by signal 15 before the evaluation"):
        run(recipe, tmp_path / "run", handle_signals=True)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run(resuming(recipe), tmp_path / "run")["iterations"] == 12


def words(recipe: Path, folder: Path) -> list[str]:
    return ["train", str(recipe), "-o", str(folder), "--quiet", "--resume", "--threads", "1"]


def started(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    with open(folder.with_name("output"), "ab") as output:
        typed = [sys.executable, "-m", "tiltflow", *words(recipe, folder)]
        return subprocess.Popen(typed, stdout=output, stderr=output)


def copied(recipe: Path, folder: Path) -> Beside:
    return Beside(command, *words(recipe, folder), output=folder.with_name("output"))


def wait_for_steps(folder: Path, count: int, process: Beside | Forked | subprocess.Popen[bytes]) -> None:
    metrics = folder / "metrics.jsonl"
    for _ in range(6000):  # minutes, where others use the processor too
        if (metrics.exists() and metrics.read_text().count("\n") >= count) or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError("the run makes no progress")


def test_all_signals_that_ask_to_stop_are_noted_but_for_those_that_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        before, told = signal.signal(number, signal.SIG_DFL), list[int]()
        try:
            with noted(told.append) as stop:
                assert stop() is None
                os.kill(os.getpid(), number)
                assert stop() == number
                with pytest.raises(SystemExit) as left:
                    os.kill(os.getpid(), number)
            assert left.value.code == 128 + number
            assert told == [number]
            assert signal.getsignal(number) == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN)  # as nohup does
            with noted(told.append) as stop:
                os.kill(os.getpid(), number)
                assert stop() is None
        finally:
            signal.signal(number, before)


def test_a_terminal_that_is_closed_saves_and_leaves(tmp_path: Path) -> None:
    """SIGHUP comes from the kernel, and writing to the terminal fails from then on."""
    training = TRAINING | {"max_train_steps": 100_000, "checkpointing_steps": 0}
    recipe = tiny_recipe(tmp_path, training=training, evaluation=NO_JUDGE)
    master, slave = pty.openpty()

    def in_a_session_of_its_own() -> None:
        os.close(master)
        os.login_tty(slave)

    arguments = [part for part in words(recipe, tmp_path / "run") if part != "--quiet"]  # the progress bar writes too
    process = Beside(command, *arguments, first=in_a_session_of_its_own)
    closing = threading.Event()
    reader = threading.Thread(target=read_until, args=(closing, master), daemon=True)
    reader.start()
    try:
        os.close(slave)
        wait_for_steps(tmp_path / "run", 4, process)
        closing.set()
        reader.join()  # a terminal that somebody still reads from is not hung up
        os.close(master)
        assert process.wait(timeout=60) == 129
    finally:
        process.kill()
    (saved,) = checkpoints(tmp_path / "run" / FOLDER)
    assert load_checkpoint(saved)["loop"]["step"] == rows(tmp_path / "run")[-1]["step"]


def read_until(closing: threading.Event, fd: int) -> None:
    """So that who writes does not wait for a reader."""
    with suppress(OSError):
        while not closing.is_set():
            if select.select([fd], [], [], 0.05)[0]:
                os.read(fd, 1 << 16)


@pytest.mark.parametrize(
    ("number", "start"),
    [
        *((number, copied) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)),
        pytest.param(signal.SIGTERM, started, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves_with_its_code(number: int, start: Any, tmp_path: Path) -> None:
    training = TRAINING | {"max_train_steps": 100_000, "checkpointing_steps": 0}
    recipe = tiny_recipe(tmp_path, training=training, evaluation=NO_JUDGE)
    process = start(recipe, tmp_path / "run")
    try:
        wait_for_steps(tmp_path / "run", 4, process)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        assert "rerun with --resume to continue" in (tmp_path / "output").read_text()
    finally:
        process.kill()
    (saved,) = checkpoints(tmp_path / "run" / FOLDER)
    assert load_checkpoint(saved)["loop"]["step"] == rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    """In a reward that takes forever, where the first signal cannot be served."""
    (tmp_path / "slow.py").write_text(
        "import time, pathlib\n"
        "def reward(x):\n"
        "    if pathlib.Path('go').exists():\n"
        "        pathlib.Path('stuck').touch()\n"
        "        for _ in range(600):\n"
        "            time.sleep(0.1)\n"
        "    return x.mean((1, 2, 3))\n"
    )
    training = TRAINING | {"max_train_steps": 100_000}
    recipe = tiny_recipe(tmp_path, training=training, evaluation=NO_JUDGE, reward={"name": "function", "path": "slow:reward"})
    process = Beside(command, *words(recipe, tmp_path / "run"), folder=tmp_path)
    try:
        wait_for_steps(tmp_path / "run", 3, process)
        (tmp_path / "go").touch()
        for _ in range(600):
            if (tmp_path / "stuck").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 143
    finally:
        process.kill()


# ---- contract 3: SIGKILL ----


class Forked(multiprocessing.context.ForkProcess):
    """A run in a copy of this process, which need not import everything first."""

    def __init__(self, recipe: Path, folder: Path):
        super().__init__(target=run, args=(resuming(validate(Recipe, read_yaml(recipe), "recipe")), folder))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("kills", "start"), [(6, Forked), pytest.param(50, started, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_is_bitwise_the_same(kills: int, start: Any, tmp_path: Path) -> None:
    """A real process and a real SIGKILL, at a random time after the run has begun to go on; a checkpoint at every batch, so
    that many of them hit a save."""
    steps = 24 * kills
    training = TRAINING | {"max_train_steps": steps, "checkpointing_steps": 1}
    recipe = tiny_recipe(
        tmp_path,
        training=training,
        evaluation=NO_JUDGE,
        method={"name": "score-as-action"} | SHORT | METHODS["score-as-action"],
    )
    chance, done, where = random.Random(kills), 0, []
    while done < kills:
        progress = len(rows(tmp_path / "parts")) if (tmp_path / "parts" / "metrics.jsonl").exists() else 0
        process = start(recipe, tmp_path / "parts")
        wait_for_steps(tmp_path / "parts", progress + 3, process)
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        code = process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "output").read_text()
        done += 1
        where.append(len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()))
    assert done >= min(kills, 4)
    for folder in ("parts", "whole"):
        assert start(recipe, tmp_path / folder).wait() == 0
    print(f"{done} kills, at steps {where} of {steps}")
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("unmeasured")
def test_the_recipe_on_disk_says_nothing_of_the_resume(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "adjoint-matching")
    run(resuming(recipe), tmp_path / "run")
    assert read_yaml(tmp_path / "run" / "recipe.yaml")["training"]["resume_from_checkpoint"] is None


def test_global_randomness_is_not_touched(tmp_path: Path) -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr, index]
    run(recipe_for(tmp_path, "score-as-action"), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]  # type: ignore[union-attr, index]
    assert os.getcwd()
