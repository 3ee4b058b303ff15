"""What a person sees of a training run while it runs: in a terminal, in a notebook, and elsewhere."""

from __future__ import annotations

import builtins
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import rich.progress
from rich.console import Console
from tiny import tiny_recipe
from torch import Tensor, nn
from typer.testing import CliRunner

import tiltflow
from tiltflow.commands.terminal.app import app
from tiltflow.commands.terminal.progress import training_progress
from tiltflow.training.trainer import Record


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.linear(x)
        return found


def tune(**more: Any) -> None:
    model = tiltflow.Model(tiltflow.Flow(Net()), (2,))
    training = tiltflow.Training(max_train_steps=3, train_batch_size=4)
    method = tiltflow.AdjointMatching(num_inference_steps=3)
    tiltflow.tune(model, lambda x: x[:, 0], method, training, **more)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[rich.progress.Progress]:
    """Standard output is a terminal. The bars that are drawn."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    bars: list[rich.progress.Progress] = []
    start = rich.progress.Progress.start

    def noted(self: rich.progress.Progress) -> None:
        bars.append(self)
        start(self)

    monkeypatch.setattr(rich.progress.Progress, "start", noted)
    return bars


def test_tune_shows_a_bar_in_a_terminal(terminal: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    records: list[Record] = []
    tune(callbacks=[records.append])
    assert len(terminal) == 1
    assert terminal[0].tasks[0].completed == 3
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert "samples/s" in shown
    assert "evaluating" not in shown
    assert terminal[0].tasks[0].fields["stage"] == ""
    assert [record.step for record in records] == [1, 2, 3]


def test_a_bar_can_be_switched_off(terminal: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    tune(progress=False)
    assert not terminal
    assert capsys.readouterr().out == ""


def test_of_several_processes_only_the_main_one_shows_it(
    terminal: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    tune(progress=True)
    assert not terminal
    assert capsys.readouterr().out == ""


def test_elsewhere_tune_is_silent_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    tune()
    assert capsys.readouterr().out == ""
    tune(progress=True)
    assert re.fullmatch(r"(\d/3  .*\n){3}", capsys.readouterr().out)


class Notebook(list[str]):
    """What the output of a cell shows, one version after the other, and the parts of IPython that are used."""

    def HTML(self, text: str) -> str:
        return text

    def display(self, text: str, *, display_id: bool) -> Notebook:
        assert display_id
        self.append(text)
        return self

    def update(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    cell = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", cell)
    return cell


def test_tune_shows_a_bar_in_a_notebook(notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> None:
    tune()
    assert notebook[0].startswith('<progress value="0" max="3"></progress> 0/3')
    assert notebook[-1].startswith('<progress value="3" max="3"></progress> 3/3')
    assert "samples/s" in notebook[-1]
    assert capsys.readouterr().out == ""
    shown = len(notebook)
    tune(progress=False)
    assert len(notebook) == shown


def test_a_notebook_is_not_flooded(notebook: Notebook) -> None:
    with training_progress(Console(), False, 1000) as watch:
        for step in range(1, 1001):
            watch(Record(step, {"reward": 1.0}, step / 1000, 0))
    assert 5 <= len(notebook) <= 8
    assert "1000/1000" in notebook[-1]


def test_the_command_line_has_one_bar(terminal: list[Any], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(tiny_recipe(tmp_path)), "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert len(terminal) == 1
