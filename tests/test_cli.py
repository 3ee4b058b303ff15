"""The command line as a script and as a stranger meet it: output, exit codes, one line for each mistake."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from tiny import tiny_flow, tiny_recipe
from typed import apart, typed
from typer.testing import CliRunner

import tiltflow
import tiltflow.commands.terminal.app
from tiltflow.commands import verify
from tiltflow.commands.sample import SOLVERS
from tiltflow.commands.terminal.progress import training_progress
from tiltflow.commands.verify import METHODS
from tiltflow.errors import TiltflowError
from tiltflow.plugins import find
from tiltflow.pretraining.loop import Progress
from tiltflow.problems import Problem
from tiltflow.settings import parse_yaml
from tiltflow.training.trainer import Record


def tiltflow_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tiltflow", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "300"},
    )


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["tiltflow", *arguments])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        tiltflow.commands.terminal.app.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_what_is_said_of_processors_that_are_not_used_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    call(monkeypatch, capsys, "--version")
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.warning("`CLIPImageProcessor` requires torchvision (not installed); falling back")
    logger.warning("another")
    assert caplog.messages == ["another"]


def test_train_evaluate_and_sample_from_the_folder(tmp_path: Path) -> None:
    recipe, folder = tiny_recipe(tmp_path), tmp_path / "run"
    trained = tiltflow_command("train", str(recipe), "--output", str(folder), "--json", "--threads", "1")
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout.splitlines()[-1])
    assert len(trained.stdout.splitlines()) == 1
    assert summary == json.loads((folder / "summary.json").read_text())
    assert {
        "reward_base",
        "reward_tuned",
        "target_distance",
        "effective_sample_size",
        "judge",
        "seconds",
        "network_evaluations",
    } <= set(summary)
    assert "report.html" in trained.stderr
    assert "reward" in trained.stderr

    grid, arrays = tmp_path / "grid.png", tmp_path / "x.npz"
    again, drawn, saved, exported = typed(
        ["evaluate", str(folder), "--json", "--threads", "1", "--quiet", "--num-samples", "16"],
        ["sample", str(folder), "-o", str(grid), "-n", "4"],
        ["sample", str(folder), "-o", str(arrays), "-n", "4", "--solver", "heun"],
        ["export", str(folder), "-o", str(tmp_path / "exported")],
    )
    assert json.loads(again.stdout.splitlines()[-1])["num_samples"] == 16
    assert drawn.returncode == saved.returncode == 0
    Image.open(grid).verify()
    with np.load(arrays) as archive:
        assert archive["samples"].shape == (4, 1, 8, 8)
    assert exported.stdout.strip() == f'tiltflow.load("{tmp_path / "exported"}") loads it'
    assert tiltflow.load(tmp_path / "exported").event_shape == (1, 8, 8)


def test_the_rate_is_of_samples_that_were_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    """64 samples in four steps on each, eight seconds: eight a second, not 32. In pretraining, images of all stages."""
    with training_progress(Console(width=200), False, 4) as watch:
        watch(Record(4, {"reward": 1.0}, 8.0, 0, samples_drawn=64))
    assert "8 samples/s" in capsys.readouterr().out
    with training_progress(Console(width=200), False, 4) as watch:
        watch(Progress("denoiser", 4, samples=64, loss=1.0, seconds=8.0))
    assert "loss 1.000  8 samples/s" in capsys.readouterr().out


def test_verify_prints_one_json_object_with_the_promised_keys() -> None:
    arguments = ["verify", "gaussian", "--json", "--iterations", "3", "--set", "dimension=1", "--set", "scale=0.3"]
    small = ["--set", "num_samples=200", "--set", "num_samples_w2=100", "--set", "method.num_inference_steps=5"]
    done = CliRunner().invoke(tiltflow.commands.terminal.app.app, [*arguments, *small])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= {
        "problem", "method", "distance", "floor", "floor_std", "distance_base", "reward", "reward_exact", "control_error",
        "iterations", "network_evaluations", "seconds",
    }  # fmt: skip
    assert result["iterations"] == 3
    assert result["reward_exact"] == pytest.approx(1.7 * (0.7 + 0.3**2 * 1.7))  # N(m + c s^2, s^2)


@pytest.mark.parametrize(("dimension", "said"), [(1, "mean reward 0."), (3, "not computed above two dimensions")])
def test_verify_says_what_the_chain_can_reach(dimension: int, said: str) -> None:
    arguments = ["verify", "gaussian", "--iterations", "1", "--set", f"dimension={dimension}", "--set", "linear=0.5", "--json"]
    small = ["num_samples=100", "num_samples_w2=100", "method.num_inference_steps=5", "draws=2", "train_batch_size=4"]
    done = CliRunner().invoke(
        tiltflow.commands.terminal.app.app, [*arguments, *(part for one in small for part in ("--set", one))]
    )
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert f"best that this chain can reach {'' if dimension > 1 else '0.'}" in words
    assert said in words
    assert ("within the one dimension of the tilt" in words) == (dimension > 1)
    best = json.loads(done.stdout.splitlines()[-1])["chain_optimum"]
    assert best is None if dimension > 1 else set(best) == {"distance", "reward", "path_kl", "num_inference_steps"}


def mistakes(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    recipe = str(tiny_recipe(tmp_path))
    new = ["--output", str(tmp_path / "new")]
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "summary.json").write_text("{}")
    broken = tiny_flow(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"xx")
    (tmp_path / "typo.yaml").write_text("modle: digits-flow\n")
    (tmp_path / "odd.py").write_text(
        "def nan(x): return x.flatten(1).sum(1) * float('nan')\ndef wrong(x): return x.sum()\ndef rgb(x): return (x * x.new_ones(3, 5, 5)).sum((1, 2, 3))\n"
    )
    return {
        "wrong key": (["train", recipe, *new, "--set", "training.max_train_step=3"], "max_train_step is not a setting, did you mean 'max_train_steps'"),
        "wrong type": (["train", recipe, *new, "--set", "optimizer.learning_rate=fast"], "optimizer.learning_rate must be a valid number"),
        "wrong range": (["train", recipe, *new, "--set", "optimizer.learning_rate=-1"], "optimizer.learning_rate must be greater than 0 (got -1)"),
        "key in a file": (["train", str(tmp_path / "typo.yaml"), *new], "modle is not a setting, did you mean 'model'"),
        "missing file": (["train", str(tmp_path / "none.yaml"), *new], "none.yaml: no such file"),
        "unreadable weights": (["train", recipe, *new, "--set", f"model={broken}"], "the weights cannot be read"),
        "unknown recipe": (["train", "digits-evn", *new], "there is no recipe 'digits-evn', did you mean 'digits-even'"),
        "unknown method": (["train", recipe, *new, "--set", "method={name: adjoint}"], "there is no method 'adjoint', did you mean 'adjoint-matching'"),
        "unknown reward": (["train", recipe, *new, "--set", "reward=inc"], "there is no reward 'inc', did you mean 'ink'"),
        "unknown problem": (["verify", "mixtre"], "there is no problem 'mixtre', did you mean 'mixture'"),
        "unknown verify key": (["verify", "mixture", "--set", "radios=3"], "'radios' is not a setting, did you mean 'radius'"),
        "reward of the wrong shape": (["train", recipe, *new, "--set", "reward={name: function, path: 'odd:wrong'}"], "one number per sample"),
        "reward of NaN": (["train", recipe, *new, "--set", "reward={name: function, path: 'odd:nan'}"], "the reward is not finite for 2 of 2"),
        "reward for other shapes": (["train", recipe, *new, "--set", "reward={name: function, path: 'odd:rgb'}"], "does not take samples of shape [1, 8, 8]"),
        "occupied folder": (["train", recipe, "--output", str(tmp_path / "occupied")], "already holds something"),
        "no such run": (["evaluate", str(tmp_path / "none")], "not a run folder"),
        "no such device": (["train", recipe, *new, "--device", "warp"], "torch has no such device"),
        "no picture": (["sample", str(tmp_path / "flow"), "--output", "x.jpg"], "must end in .png, .gif, .xyz, .sdf or .npz"),
        "no data": (["pretrain", "digits-flow", "--data", str(tmp_path / "no.npz"), *new], "no such data set"),
        "no such option": (["train", recipe, "--ouput", "x"], "No such option: --ouput"),
    }  # fmt: skip


def test_each_mistake_is_one_line_exit_code_2_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (arguments, message) in mistakes(tmp_path).items():
        code, out, err = call(monkeypatch, capsys, *arguments)
        assert code == 2, name
        assert message in err, name
        assert "{" not in out, name  # no result
        assert "Traceback" not in err, name
        if not message.startswith("No such option"):
            assert len(err.strip().splitlines()) == 1, (name, err)
        assert not (tmp_path / "new").exists(), name
        assert (tmp_path / "occupied" / "summary.json").read_text() == "{}"


def test_help_teaches_by_example_and_lists_are_complete() -> None:
    runner = CliRunner()
    verbs: dict[str, Any] = typer.main.get_command(tiltflow.commands.terminal.app.app).commands  # type: ignore[attr-defined]
    for name, verb in verbs.items():
        assert f"[dim]tiltflow {name} " in verb.help, name
        for parameter in verb.params:
            assert parameter.help.strip().endswith((".", "..")), f"{name}: {parameter.name} is not explained"
    result = runner.invoke(tiltflow.commands.terminal.app.app, ["train", "--help"])
    assert (result.exit_code, "tiltflow train" in result.output) == (0, True)
    listed: dict[str, Any] = json.loads(
        runner.invoke(tiltflow.commands.terminal.app.app, ["recipes", "--json"]).stdout.splitlines()[-1]
    )
    assert {entry["name"] for entry in listed["recipes"]} >= {"digits-even", "digits-flow", "digits-judge"}
    assert all(entry["description"] for entry in listed["recipes"])
    assert (
        parse_yaml(runner.invoke(tiltflow.commands.terminal.app.app, ["recipes", "digits-even"]).output, "recipe")["model"]
        == "digits-latent-flow"
    )


def test_a_verb_is_one_file(tmp_path: Path) -> None:
    """In a copy of the package, made of links, with one file more."""
    package, own = Path(tiltflow.__file__).parent, tmp_path / "tiltflow"
    (own / "commands").mkdir(parents=True)
    for folder, copy in ((package, own), (package / "commands", own / "commands")):
        for path in folder.iterdir():
            if path.name not in ("commands", "__pycache__"):
                (copy / path.name).symlink_to(path)
    (own / "commands" / "say_hello.py").write_text(
        "from tiltflow.commands.terminal.options import Json\n\n"
        "def say_hello(name: str, as_json: Json = False) -> None:\n"
        '    """Greet somebody."""\n'
        "    print(f'hello {name}')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "100"}
    help_, said = (
        subprocess.run([sys.executable, "-m", "tiltflow", *words], capture_output=True, text=True, env=environment).stdout
        for words in (["--help"], ["say-hello", "you"])
    )
    assert said == "hello you\n"
    assert help_.index("Greet somebody.") > help_.index("settings  ")  # after those that ship
    assert set(typer.main.get_command(tiltflow.commands.terminal.app.app).commands) == {  # type: ignore[attr-defined]
        path.stem.replace("_", "-") for path in (package / "commands").glob("*.py") if path.stem != "__init__"
    }


def test_choices_are_shown_and_are_those_of_the_library() -> None:
    assert all(find("methods", name) for name in METHODS)
    assert all(find("samplers.solvers", name) for name in SOLVERS)
    assert all(isinstance(find("problems", name)(), Problem) for name in verify.PROBLEMS)
    runner = CliRunner(env={"COLUMNS": "300"})
    shown = {
        command: runner.invoke(tiltflow.commands.terminal.app.app, [command, "--help"]).output
        for command in ("verify", "sample")
    }
    assert all(name in shown["verify"] for name in (*METHODS, *verify.PROBLEMS))
    assert all(name in shown["sample"] for name in SOLVERS)


def completed(line: str) -> list[str]:
    """What bash would be offered at the end of a line."""
    words = line.split(" ")
    asked = {"_TILTFLOW_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['tiltflow']; from tiltflow.commands.terminal.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    return done.stdout.split()


def test_the_shell_completes_names() -> None:
    assert completed("tiltflow verify mixture --method ") == list(METHODS)
    assert completed("tiltflow sample digits-flow --solver euler") == ["euler", "euler-maruyama"]
    assert completed("tiltflow train digits-even-p") == [
        "digits-even-pixels-long",
        "digits-even-pixels-reweighted",
        "digits-even-pixels",
    ]
    assert completed("tiltflow settings adj") == ["adjoint-matching"]
    assert "complete -o default -F _tiltflow_completion tiltflow" in shell_script()


def shell_script() -> str:
    code = "import sys; sys.argv = ['tiltflow', '--show-completion']; from tiltflow.commands.terminal.app import main; main()"
    asked = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    return subprocess.run(
        [sys.executable, "-c", code.replace("'--show-completion'", "'--show-completion', 'bash'")],
        capture_output=True, text=True, env=os.environ | asked,
    ).stdout  # fmt: skip


def test_settings_are_listed_for_people_and_for_programs() -> None:
    runner = CliRunner(env={"COLUMNS": "200"})
    assert "temperature" in runner.invoke(tiltflow.commands.terminal.app.app, ["settings", "adjoint-matching"]).output.lower()
    done = runner.invoke(tiltflow.commands.terminal.app.app, ["settings", "training", "--json"])
    found = json.loads(done.stdout.splitlines()[-1])
    ((first, *_),) = (kind["settings"] for kind in found.values())
    assert set(first) == {"name", "type", "default", "description"}
    assert first["name"].startswith("training.")
    assert "adjoint-matching" in runner.invoke(tiltflow.commands.terminal.app.app, ["settings"]).output


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asks.py").write_text(
        "import os, signal\n"
        "def reward(x):\n"
        "    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL and not os.path.exists('asked'):\n"
        "        open('asked', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return x.mean((1, 2, 3))\n"
    )
    recipe = tiny_recipe(tmp_path, reward={"name": "function", "path": "asks:reward"}, evaluation={"num_samples": 4})
    code, _, err = call(monkeypatch, capsys, "train", str(recipe), "--output", "run", "--json")
    assert code == 143
    assert "Stopping: no step is done yet. Press Ctrl-C again to quit at once." in err
    assert "stopped by signal 15 at step 0; rerun with --resume to start again; nothing was saved" in err
    assert "saving" not in err
    code, _, err = call(monkeypatch, capsys, "train", str(recipe), "--output", "run", "--json", "--resume")
    assert code == 0, err


def test_errors_of_ours_are_the_only_ones_caught() -> None:
    assert issubclass(tiltflow.InputError, TiltflowError)
    assert not issubclass(ValueError, TiltflowError)


def test_importing_tiltflow_imports_nothing_heavy() -> None:
    code = "import sys, tiltflow; print([m for m in ('torch', 'pydantic', 'matplotlib', 'typer', 'ot') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


HEAVY = ("matplotlib", "scipy.interpolate", "scipy.optimize", "ot", "torchmetrics", "diffusers", "transformers", "peft")


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from tiltflow.commands.terminal.app import main
sys.argv = ["tiltflow", "--help"]
try:
    main()
finally:
    print([name for name in ("torch", "scipy", *{HEAVY}) if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert any("Tune a model" in line for line in said)
    assert said[-1] == "[]"


def imported_with_a_run() -> list[str]:
    for name in [name for name in sys.modules if f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY))]:
        del sys.modules[name]
    importlib.import_module("tiltflow.runs.run")
    return [name for name in HEAVY if name in sys.modules]


def test_a_run_begins_without_what_only_some_of_them_need() -> None:
    assert apart(imported_with_a_run) == []


def test_what_is_not_ours_is_shown_and_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markup, control characters and marks of direction in paths, descriptions, names of classes, keys and files' contents."""
    odd = "[red]a[/b] \x1b[2J\u202e\\"
    shown = "[red]a[/b] \\x1b[2J\\u202e\\"
    recipe = tiny_recipe(tmp_path, description=odd, training={"max_train_steps": 1, "train_batch_size": 4})
    judge = tmp_path / "judge" / "config.json"
    judge.write_text(json.dumps(json.loads(judge.read_text()) | {"class_names": [odd, "b", "c"]}))
    folder = tmp_path / odd
    said = ""
    for arguments in (
        ["train", str(recipe), "--output", str(folder)],
        ["train", str(recipe), "--output", str(folder)],
        ["evaluate", str(folder), "--num-samples", "4"],
        ["sample", str(folder), "-n", "4", "-o", str(folder / "new" / "x.png")],
        ["verify-checkpoint", str(folder)],
        ["verify-checkpoint", str(tmp_path / "none" / odd)],
        ["train", str(recipe), "--output", str(tmp_path / "n"), "--set", f"{odd}=1"],
        ["train", str(recipe), "--output", str(tmp_path / "n"), "--set", f"model={odd}"],
        ["train", str(recipe), "--output", str(tmp_path / "n"), "--set", "reward={name: http, url: 'http://me:s3cret@h'}"],
        ["train", str(recipe), "--output", str(tmp_path / "n"), "--set", "reward={name: http, url: 'http://h?key=s3cret'}"],
        ["train", str(recipe), "--output", str(tmp_path / "n"), "--set", "reward.url:http://me:s3cret@h"],
    ):
        monkeypatch.setattr(sys, "argv", ["tiltflow", *arguments])
        monkeypatch.setenv("COLUMNS", "400")
        with pytest.raises(SystemExit):
            tiltflow.commands.terminal.app.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        said += out + err
    assert all(letter.isprintable() or letter == "\n" for letter in said), said
    assert "s3cret" not in said
    assert f"report: {tmp_path}/{shown}/report.html" in said
    assert f"4 samples in {tmp_path}/{shown}/new/x.png" in said
    assert f"judge sees {shown}, c" in said
    assert f"{shown} is not a setting" in said
    assert said.count(shown) >= 9
