"""What a run does when something goes wrong: numbers that are not finite, and too little memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import same
from tiny import tiny_recipe
from torch import Tensor
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app
from tiltflow.errors import NonFiniteError, OutOfMemoryError, UserCodeError
from tiltflow.optimization import all_finite
from tiltflow.runs.checkpoint import FOLDER, checkpoints, load_checkpoint, tensors_in
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.runs.run_files import read_records
from tiltflow.settings import read_yaml, validate

TRAINING = {"max_train_steps": 6, "train_batch_size": 4, "checkpointing_steps": 2}
MEASURED = {"num_samples": 8, "grid": 4, "batch_size": 8}
BROKEN = """
import torch
calls = 0
def reward(x):
    global calls
    calls += 1
    values = x.mean((1, 2, 3))
    if calls in {when}:
        values = {how}
    return values
"""


def recipe_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, when: str, how: str, method: str = "adjoint-matching", **training: Any
) -> Recipe:
    """A reward of which some calls go wrong. The first is the check before training."""
    name = f"broken_{abs(hash(folder)) % 10**8}"
    (folder / f"{name}.py").write_text(BROKEN.format(when=when, how=how))
    monkeypatch.syspath_prepend(folder)
    settings = {"name": method, "num_inference_steps": 4}
    settings |= {"min_effective_sample_size": 1} if method == "orw-cfm-w2" else {}
    path = tiny_recipe(
        folder,
        reward={"name": "function", "path": f"{name}:reward"},
        method=settings | {"num_passes": 1},
        optimizer={"learning_rate": 1e-3},
        training=TRAINING | training,
        evaluation=MEASURED,
    )
    return validate(Recipe, read_yaml(path), "recipe")


NAN = "values * torch.tensor([1.0, float('nan'), 1, 1])"


# ---- contract 6: finite or stop ----


@pytest.mark.parametrize("method", ["adjoint-matching", "score-as-action", "orw-cfm-w2"])
def test_a_reward_that_is_not_finite_stops_with_a_diagnosis(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step that writes no checkpoint and no tenth of a progress line; nothing is averaged over it."""
    recipe = recipe_with(tmp_path, monkeypatch, "{5}", NAN, method)
    with pytest.raises(NonFiniteError, match="the reward is not finite for 1 of 4 samples"):
        run(recipe, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "diagnostics").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert report["what"] == "reward"
    assert report["samples"] == [1]
    assert report["step"] == 4
    assert folder.name == "step-00000004"
    tensors = load_file(folder / "tensors.safetensors")
    assert tensors["rewards"].isnan().tolist() == [False, True, False, False]
    assert tensors["samples"].shape == (1, 1, 8, 8)
    # no checkpoint from a broken state, and the one before is good
    assert [saved.name for saved in checkpoints(tmp_path / "run" / FOLDER)] == ["step-00000002"]
    assert all(math.isfinite(value) for row in read_records(tmp_path / "run") for value in row.values())
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_failure_at_once_leaves_its_diagnosis_and_the_folder_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with(tmp_path, monkeypatch, "{2}", NAN)
    with pytest.raises(NonFiniteError):
        run(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["diagnostics"]
    assert run(recipe, tmp_path / "run")["iterations"] == 6  # the reward is fine now, and the folder not occupied


@pytest.mark.parametrize("method", ["adjoint-matching", "score-as-action", "orw-cfm-w2"])
def test_skipping_has_a_hard_cap_and_is_counted(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with(tmp_path, monkeypatch, "{4, 6}", NAN, method, max_skipped_steps=1)
    run(recipe, tmp_path / "run")
    rows = read_records(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row.get("skipped")] == [3, 5]
    (tmp_path / "other").mkdir()
    again = recipe_with(tmp_path / "other", monkeypatch, "{4, 5}", NAN, method, max_skipped_steps=1)
    with pytest.raises(NonFiniteError):
        run(again, tmp_path / "again")  # two in a row


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("method", ["adjoint-matching", "score-as-action", "orw-cfm-w2"])
def test_samples_without_a_reward_are_dropped_and_counted(
    method: str, micro: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not averaged over, and not the whole batch: the other three are drawn again and learned from."""
    how = "values * torch.tensor([1.0] * (len(values) - 1) + [float('nan')])"
    recipe = recipe_with(tmp_path, monkeypatch, "{4}", how, method, non_finite_rewards="drop", micro_batch_size=micro)
    run(recipe, tmp_path / "run")
    rows = read_records(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["dropped"] for row in rows if "dropped" in row] == [1.0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert not (tmp_path / "run" / "diagnostics").exists()


def test_a_reward_that_fails_for_nearly_all_is_no_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = "torch.cat([values[:1], values[1:] * float('nan')])"
    recipe = recipe_with(tmp_path, monkeypatch, "{4}", how, non_finite_rewards="drop")
    with pytest.raises(NonFiniteError, match="not finite for 3 of 4 samples"):
        run(recipe, tmp_path / "run")


def test_the_diagnosis_counts_samples_from_the_first_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In micro-batches of two, the second sample of the second one is number 3."""
    recipe = recipe_with(tmp_path, monkeypatch, "{5}", "values * torch.tensor([1.0, float('nan')])", micro_batch_size=2)
    with pytest.raises(NonFiniteError) as error:
        run(recipe, tmp_path / "run")
    assert error.value.where["samples"] == [3]


@pytest.mark.parametrize(("when", "steps"), [("{4}", 3), ("{3, 5}", 4)])
def test_a_skipped_batch_leaves_no_trace(when: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimizer, critic: all as if it had not been; and where an earlier one was skipped."""
    recipe = recipe_with(
        tmp_path, monkeypatch, when, NAN, "score-as-action", max_skipped_steps=1, max_train_steps=steps, checkpointing_steps=1,
        checkpoints_total_limit=None,
    )  # fmt: skip
    run(recipe, tmp_path / "run")
    before, after = (load_checkpoint(saved)["loop"] for saved in checkpoints(tmp_path / "run" / FOLDER)[-2:])
    assert (before["step"], after["step"]) == (steps - 1, steps)
    for key in ("parameters", "optimizer", "method", "average"):
        same(before[key], after[key])


@pytest.mark.parametrize(("shape", "at", "steps", "samples"), [((3, 4), (1, 2), [1], [2]), ((3, 4, 5), (2, 0, 3), [2], [0])])
def test_what_is_not_finite_is_named_by_step_time_and_sample(
    shape: tuple[int, ...], at: tuple[int, ...], steps: list[int], samples: list[int]
) -> None:
    values, times = torch.zeros(shape), torch.tensor([0.0, 0.25, 0.5])
    all_finite(values, "adjoint", times)
    values[at] = math.inf
    with pytest.raises(NonFiniteError, match=f"adjoint is not finite at 1 of 3 steps .t = {times[steps[0]]:g}") as error:
        all_finite(values, "adjoint", times)
    assert error.value.where["sampler_steps"] == steps
    assert error.value.where["samples"] == samples
    assert error.value.where["times"] == [times[steps[0]].item()]


class Poisoned(torch.nn.Module):
    """A network that returns NaN from its n-th call on."""

    def __init__(self, network: torch.nn.Module, healthy: int):
        super().__init__()
        self.network, self.left = network, healthy

    def forward(self, *arguments: Tensor) -> Tensor:
        self.left -= 1
        out: Tensor = self.network(*arguments)
        return out * math.nan if self.left < 0 else out


@pytest.mark.parametrize(
    ("method", "healthy", "what"), [("adjoint-matching", 2, "velocity"), ("score-as-action", 2, "velocity")]
)
def test_a_network_that_breaks_is_named(method: str, healthy: int, what: str) -> None:
    from tiltflow import Flow, Model, Training, tune
    from tiltflow.networks.mlp import Mlp
    from tiltflow.plugins import find

    torch.manual_seed(0)
    model = Model(Flow(Poisoned(Mlp(dimension=2).build(), healthy)), event_shape=(2,))
    settings: Any = find("methods", method)
    with pytest.raises(NonFiniteError, match=f"{what} is not finite") as error:
        tune(model, lambda x: x[:, 0], settings(num_inference_steps=4), Training(max_train_steps=1, train_batch_size=8))
    assert error.value.where["times"][0] > 0


def test_exit_code_1_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from tiltflow.commands.terminal.app import main

    recipe_with(tmp_path, monkeypatch, "{4}", NAN)
    monkeypatch.setattr(
        sys, "argv", ["tiltflow", "train", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "run"), "--quiet"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1


# ---- contract 10: out of memory ----


def cuda_says(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore words")


def cpu_says(x: Tensor) -> Tensor:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("says", [cuda_says, cpu_says])
def test_out_of_memory_says_what_to_lower(
    says: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_recipe(tmp_path, training=TRAINING | {"train_batch_size": 12, "micro_batch_size": 6}, evaluation=MEASURED)
    monkeypatch.setattr("tiltflow.runs.run.build_reward", lambda *arguments, **options: says)
    monkeypatch.setattr("tiltflow.runs.run.rehearse", lambda *arguments, **options: None)
    with pytest.raises(
        OutOfMemoryError, match=r"out of memory \(.*training.micro_batch_size=3 \(now 6\) gives the same result"
    ):
        run(validate(Recipe, read_yaml(path), "recipe"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_runtime_error_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with(tmp_path, monkeypatch, "{3}", "torch.zeros(3) + torch.zeros(4)")
    with pytest.raises(UserCodeError, match=r"the reward raised RuntimeError: The size of tensor"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("method", ["adjoint-matching", "score-as-action", "orw-cfm-w2"])
def test_gradients_of_a_split_batch_are_those_of_the_whole_one(method: str, tmp_path: Path) -> None:
    """Whole runs, batch by batch in parts: the weights after the first step, within 1e-6."""
    settings = {"name": method, "num_inference_steps": 4, "num_passes": 1}
    settings |= {"min_effective_sample_size": 1} if method == "orw-cfm-w2" else {}
    found = []
    for size in (None, 2, 1):
        training = {"max_train_steps": 1, "train_batch_size": 4, "micro_batch_size": size}
        folder = tmp_path / str(size)
        folder.mkdir()
        optimizer = {"learning_rate": 1e-3}
        path = tiny_recipe(folder, method=settings, optimizer=optimizer, training=training, evaluation=MEASURED)
        run(validate(Recipe, read_yaml(path), "recipe"), folder / "run")
        found.append(load_checkpoint(checkpoints(folder / "run" / FOLDER)[-1])["loop"]["optimizer"]["state"])
    for parts in found[1:]:
        for i, state in found[0].items():
            assert (parts[i]["exp_avg"] - state["exp_avg"]).abs().max() < 1e-6 * state["exp_avg"].abs().max() + 1e-9


def test_the_command_line_shows_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_recipe(tmp_path, training=TRAINING, evaluation=MEASURED)
    monkeypatch.setattr("tiltflow.runs.run.build_reward", lambda *arguments, **options: cuda_says)
    monkeypatch.setattr("tiltflow.runs.run.rehearse", lambda *arguments, **options: None)
    result = CliRunner().invoke(app, ["train", str(path), "-o", str(tmp_path / "run")])
    assert isinstance(result.exception, OutOfMemoryError)


# ---- what is saved is finite ----


@pytest.mark.usefixtures("unmeasured")
def test_what_the_optimizer_step_has_broken_is_not_saved(tmp_path: Path) -> None:
    """A learning rate that makes the weights infinite, from a loss and a gradient that are finite."""
    method = {"name": "adjoint-matching", "num_inference_steps": 4}
    tree = {"method": method, "optimizer": {"learning_rate": 1e39, "lr_warmup_steps": 0}, "training": TRAINING}
    recipe = validate(Recipe, read_yaml(tiny_recipe(tmp_path, **tree, evaluation=MEASURED)), "recipe")
    notes: list[str] = []
    with pytest.raises(NonFiniteError) as error:
        run(recipe, tmp_path / "run", note=notes.append)
    assert "not finite" in str(error.value)
    assert not (tmp_path / "run" / FOLDER).exists()
    assert not (tmp_path / "run" / "model").exists()
    assert any("of the tuned model" in note and "not saved" in note for note in notes)


@pytest.mark.parametrize("what", ["parameters", "optimizer"])
@pytest.mark.usefixtures("unmeasured")
def test_no_checkpoint_of_a_state_that_is_not_finite_and_the_older_ones_stay(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step between the second and the third checkpoint breaks a weight, or a moment of the optimizer alone."""
    training = TRAINING | {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "ema_decay": 0.5}
    recipe = validate(Recipe, read_yaml(tiny_recipe(tmp_path, training=training, evaluation=MEASURED)), "recipe")
    step, steps = torch.optim.AdamW.step, 0

    def broken(self: torch.optim.AdamW, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        result = step(self, *arguments)
        if steps == 3:
            parameter = self.param_groups[0]["params"][0]
            tensor = parameter.data if what == "parameters" else self.state[parameter]["exp_avg_sq"]
            tensor.view(-1)[1] = math.inf
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(NonFiniteError, match=r"step 3: loop/.* of the checkpoint (is|are) not finite, so it is not saved"):
        run(recipe, tmp_path / "run")
    saved = checkpoints(tmp_path / "run" / FOLDER)
    assert [folder.name for folder in saved] == ["step-00000001", "step-00000002"]
    assert all(tensor.isfinite().all() for folder in saved for tensor in tensors_in(load_checkpoint(folder)).values())
    (folder,) = (tmp_path / "run" / "diagnostics").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert any(name.startswith(f"loop/{what}/") for name in report["parameters"])
    if what == "optimizer":  # the weights are good
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()
