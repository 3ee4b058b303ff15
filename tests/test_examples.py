"""The examples, run as they are with fewer steps; their scripts, with stand-ins for the queue; every command in them is one."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import serving
from test_commands import GROUP, check, in_blocks
from typer.testing import CliRunner

import tiltflow
from tiltflow import allow_code
from tiltflow.commands.terminal.app import app
from tiltflow.rewards.serving.server import Served, make_server
from tiltflow.settings import read_yaml, validate

FOLDER = Path(__file__).parents[1] / "examples"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(FOLDER.rglob("*.sh"))


def example(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """What `python examples/NAME ARGUMENTS` leaves in its names, run in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(FOLDER)
    with torch.random.fork_rng():
        return runpy.run_path(str(FOLDER / name), run_name="__main__")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def runs(name: str, *arguments: str) -> dict[str, Any]:
        return example(name, *arguments, monkeypatch=monkeypatch, folder=tmp_path)

    return runs


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


# ---- Python ----


def test_a_network_of_ones_own(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("own_network.py", "30")
    before, after, _ = numbers(capsys.readouterr().out.splitlines()[-1])
    assert after > before + 0.2
    assert torch.equal(names["again"], names["tuned"].sample(4000))


def test_a_reward_of_ones_own(run: Any) -> None:
    names = run("own_reward.py", "2")
    assert Path("runs/symmetric/report.html").exists()
    assert float(names["after"]) > float(names["before"])


def test_labels(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("labels.py", "40")
    low, middle, high = (numbers(line) for line in capsys.readouterr().out.splitlines())
    assert low[1] < low[0] - 0.2
    assert high[1] > high[0] + 0.2
    assert abs(middle[1] - middle[0]) < 0.15


def test_a_policy(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("policy.py", "40")
    left, _, right = (numbers(line) for line in capsys.readouterr().out.splitlines()[-3:])
    assert left[1] < left[0]
    assert right[1] > right[0]


def test_a_utility(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("utility.py", "1", "200")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["stage 1", "stage 2", "stage 3"]
    assert Path("runs/thick/stage-03/report.html").exists()


@pytest.mark.slow  # three methods, each trained for a look at its cost and once more, and what they reach measured
def test_a_comparison(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("compare.py", "100000", "1")
    assert len(names["found"]["results"][0]["methods"]) == len(capsys.readouterr().out.splitlines()[3:-1]) == 3
    assert Path("runs/compare/report.html").exists()


@pytest.mark.filterwarnings("ignore:No LoRA keys")
def test_a_pipeline(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", reason="the extra diffusers is not installed")
    fast = tiltflow.Sampling(solver="euler", num_inference_steps=5)
    monkeypatch.setattr(tiltflow, "load", lambda name, load=tiltflow.load: replace(load(name), sampling=fast))
    run("text_to_image.py", "1")
    assert {"pytorch_lora_weights.safetensors", "red.png"} <= {path.name for path in Path("runs/colours").iterdir()}


def test_a_molecule(run: Any) -> None:
    pytest.importorskip("rdkit", reason="the extra molecules is not installed")
    pytest.importorskip("tblite", reason="the extra molecules is not installed")
    run("molecule.py", "1", "2")
    atoms, *_ = Path("runs/after.xyz").read_text().splitlines()
    assert atoms == "19"


# ---- scripts ----


def commands(script: Path) -> list[str]:
    return list(in_blocks(f"```sh\n{script.read_text()}```".replace("srun tiltflow", "exec tiltflow")))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_their_commands_can_be_typed(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    if shellcheck := shutil.which("shellcheck"):
        found = subprocess.run([shellcheck, script], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
    typed = commands(script)
    assert typed
    for command in typed:
        _, name, *words = shlex.split(command.partition(" || ")[0].rstrip("&'"))
        given = GROUP.commands[name].make_context(name, [word for word in words if word != "$@"]).params
        check(name, given)


def test_every_example_is_in_the_table() -> None:
    rows = set(re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", README, re.MULTILINE))
    assert rows == {path.name for path in FOLDER.iterdir() if path.name not in ("README.md", "__pycache__")}
    for path in [*FOLDER.glob("*.py"), *SCRIPTS]:
        assert len(path.read_text().splitlines()) <= 52, path.name


QUEUE = {"srun": 'exec "$@"', "scontrol": 'echo "$@" >> asked'}
"""Slurm, as far as the script asks it for something."""


def job(folder: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """The job, with these programs in place of others."""
    for name, text in (QUEUE | programs).items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "SLURM_JOB_ID": "7"}
    command = ["bash", FOLDER / "resume_in_a_queue.sh"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_job_goes_on_until_it_is_done(tmp_path: Path) -> None:
    """It queues again after exit code 138, and after no other."""
    assert job(tmp_path, tiltflow="kill -USR1 $$").returncode == 0  # bash dies of it: 128 + 10
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert job(tmp_path, tiltflow="exit 0").returncode == 0
    assert job(tmp_path, tiltflow="exit 2").returncode == 2
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.slow  # two processes, each of which imports all
def test_a_run_that_a_queue_stops_goes_on_in_its_next_job(tmp_path: Path) -> None:
    """tiltflow itself, in small: SIGUSR1 as soon as there is a checkpoint, then the same job again."""
    small = "--set training.train_batch_size=4 --set training.max_train_steps=60 --set training.checkpointing_steps=1"
    less = "--set evaluation.num_samples=64 --set evaluation.grid=4 --set method.num_inference_steps=4 --threads 1"
    train = f'"{sys.executable}" -m tiltflow "$@" {small} {less} &'
    stop = 'while ! ls "$HOME"/runs/even/checkpoints/step-* > /dev/null 2>&1; do sleep 0.1; done; kill -USR1 $!; wait $!'
    first = job(tmp_path, tiltflow=f"{train}\n{stop}")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    second = job(tmp_path, tiltflow=f"{train}\nwait $!")
    assert second.returncode == 0, second.stderr
    rows = (tmp_path / "runs" / "even" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 60
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_a_black_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward as it is served, and the recipe that asks for it, in small."""
    monkeypatch.chdir(FOLDER / "black_box")
    monkeypatch.syspath_prepend(FOLDER / "black_box")
    reward = validate(Served, read_yaml(Path("served.yaml")), "served.yaml").reward
    small = ["training.max_train_steps=2", "training.train_batch_size=64", "evaluation.num_samples=64", "method.num_passes=2"]
    with allow_code(), serving(make_server(reward.build(), 0)) as url:
        sets = [part for each in [*small, f"reward.url={url}"] for part in ("--set", each)]
        done = CliRunner().invoke(app, ["train", "holes.yaml", "--output", str(tmp_path / "run"), *sets])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report.html").exists()


def test_the_black_box_counts_holes() -> None:
    names = runpy.run_path(str(FOLDER / "black_box" / "holes.py"))
    picture = torch.full((2, 1, 7, 7), -1.0)
    picture[1, 0, 1:6, 1:6] = 1
    picture[1, 0, 2:5, 2:5] = -1
    assert names["score"](picture).tolist() == [0.0, 1.0]
