"""Code of the user is a guest: it gets copies, what it raises is one line, and what it cannot do is known before training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tiny import iterate, tiny_recipe
from torch import Tensor, nn
from typer.testing import CliRunner

import tiltflow
from tiltflow.commands.terminal.app import app
from tiltflow.conditions import Item
from tiltflow.errors import InputError, UserCodeError
from tiltflow.evaluation.features import features_of
from tiltflow.evaluation.samples import Asked, kept
from tiltflow.flows.flow import Flow
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.rewards import select
from tiltflow.rewards.functions.checked import evaluate, try_reward, value_and_gradient
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.functions.prompted import given
from tiltflow.runs.checkpoint import FOLDER, checkpoints
from tiltflow.runs.doctor import examine
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import rollout_ode
from tiltflow.samplers.solvers.heun import heun
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream
from tiltflow.training.records import of_machine


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Write a module of the user, and get its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(code: str) -> str:
        name = f"mine_{abs(hash(request.node.name))}_{len(list(tmp_path.glob('mine_*')))}"
        (tmp_path / f"{name}.py").write_text("import torch\n" + code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.cat([x, t[:, None]], 1))
        return out


# ---- its own copy ----


def pure(x: Tensor) -> Tensor:
    return -x.square().sum(1)


def detached(x: Tensor) -> Tensor:
    value = pure(x)
    x.detach().mul_(0.5).add_(0.5)
    return value


def through_data(x: Tensor) -> Tensor:
    value = pure(x)
    x.data.mul_(0.5)
    return value


def through_numpy(x: Tensor) -> Tensor:
    value = pure(x)
    x.detach().numpy()[:] = 7
    return value


class Buffered:
    """Gives the same tensor each time, with new numbers in it."""

    def __init__(self) -> None:
        self.values = torch.zeros(0)

    def __call__(self, x: Tensor) -> Tensor:
        self.values.resize_(len(x)).copy_(pure(x))
        return self.values


METHODS = {
    "orw": tiltflow.OrwCfmW2(num_inference_steps=4),
    "saa": tiltflow.ScoreAsAction(num_inference_steps=4),
    "am": tiltflow.AdjointMatching(num_inference_steps=4),
}


def weights(reward: Any, method: Any) -> Tensor:
    base = tiltflow.Model(Flow(Net()), (2,))
    training = tiltflow.Training(max_train_steps=3, train_batch_size=8, calibration_samples=0)
    tuned = tiltflow.tune(base, reward, method, training, optimizer=tiltflow.Optimizer(learning_rate=1e-2))
    return torch.cat([p.detach().flatten() for p in tuned.flow.parameters()])


@pytest.mark.parametrize("reward", [detached, through_data, through_numpy, Buffered()])
@pytest.mark.parametrize("method", ["orw", "saa"])
def test_a_reward_that_writes_into_its_samples_changes_nothing(method: str, reward: Any) -> None:
    assert torch.equal(weights(reward, METHODS[method]), weights(pure, METHODS[method]))


def test_a_gradient_is_right_or_refused() -> None:
    def clamped(x: Tensor) -> Tensor:
        x.clamp_(-0.5, 0.5)
        return pure(x)

    def clamp(x: Tensor) -> Tensor:
        return pure(x.clamp(-0.5, 0.5))

    assert torch.equal(weights(clamped, METHODS["am"]), weights(clamp, METHODS["am"]))
    with pytest.raises(
        UserCodeError, match=r"^the gradient of the reward raised RuntimeError: .* modified by an inplace operation"
    ):
        weights(detached, METHODS["am"])
    for reward in (through_data, through_numpy):
        with pytest.raises(InputError, match=r"changes its argument through \.data or NumPy"):
            weights(reward, METHODS["am"])


def test_evaluation_monitor_and_calibration_are_those_of_the_pure_reward(tmp_path: Path, write: Callable[[str], str]) -> None:
    name = write(
        "def pure(x): return x.mean((1, 2, 3))\n"
        "def guilty(x):\n    v = x.mean((1, 2, 3))\n    x.detach().add_(1).div_(2)\n    return v\n"
    )
    found = []
    for function in ("pure", "guilty"):
        (tmp_path / function).mkdir()
        training = {
            "max_train_steps": 4,
            "train_batch_size": 16,
            "calibration_samples": 0,
            "monitor": {"steps": 2, "num_samples": 8},
        }
        method = {"name": "score-as-action", "num_inference_steps": 3, "beta": 0.5}
        changes = {
            "reward": {"name": "function", "path": f"{name}:{function}"},
            "method": method,
            "optimizer": {"learning_rate": 1e-3},
        }
        changes["training"] = training | {"calibration_samples": 256}
        recipe = validate(Recipe, read_yaml(tiny_recipe(tmp_path / function, **changes)), "recipe")
        summary = run(recipe, tmp_path / function / "run")
        looks = (tmp_path / function / "run" / "monitor.jsonl").read_text()
        rows = [json.loads(line) for line in (tmp_path / function / "run" / "metrics.jsonl").read_text().splitlines()]
        other = ("reward_description", "model")
        summary = {key: value for key, value in summary.items() if key not in other and not of_machine(key)}
        summary["judge"] = {key: value for key, value in summary["judge"].items() if key != "model"}
        summary.pop("w2_space")
        rows = [{key: value for key, value in row.items() if not of_machine(key)} for row in rows]
        found.append((looks, rows, summary))
    assert found[0] == found[1]


def test_features_get_copies() -> None:
    images = torch.rand(5, 3, 4, 4, generator=stream(0, "images"))
    before, buffer = images.clone(), torch.zeros(2, 3)

    def guilty(part: Tensor) -> Tensor:
        buffer.resize_(len(part), 3).copy_(part.mean((2, 3)))
        part.zero_()
        return buffer

    found = features_of(images, guilty, 2, "cpu")
    assert torch.equal(images, before)
    torch.testing.assert_close(found, images.mean((2, 3)).double())


def test_a_solver_gets_copies() -> None:
    x, times = torch.randn(3, 2, generator=stream(0, "x")), time_grid(3)
    x_before, times_before = x.clone(), times.clone()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -x + t.to(x)

    def guilty(velocity: Any, x: Tensor, times: Tensor) -> list[Tensor]:
        states = [x.clone()]
        for t, s in zip(times.tolist(), times[1:].tolist(), strict=False):
            v = velocity(x, torch.tensor(t))
            x += v.mul_(s - t)
            states.append(x.clone())
        times.zero_()
        return states

    path = rollout_ode(guilty, times, velocity, x)
    assert torch.equal(x, x_before)
    assert torch.equal(times, times_before)
    for state, v, t in zip(path.states, path.velocities, times, strict=False):
        assert torch.equal(v, velocity(state, t))
    assert torch.equal(rollout_ode(heun, times, velocity, x).states[0], x)

    def repeats(velocity: Any, x: Tensor, times: Tensor) -> list[Tensor]:
        states = []
        for _ in times:
            states.append(x)
            x += 1
        return states

    with pytest.raises(InputError, match="one tensor for several times"):
        rollout_ode(repeats, times, velocity, x)


def test_a_weight_of_the_user_gets_a_copy(write: Callable[[str], str]) -> None:
    name = write("def weight(r):\n    w = r.exp()\n    r.zero_()\n    return w\ndef broken(r): raise KeyError('no')\n")
    rewards = torch.tensor([0.0, 1.0, 2.0])
    found = OrwCfmW2(weight=f"{name}:weight").weights(rewards)
    torch.testing.assert_close(found, 3 * torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0))
    assert rewards.tolist() == [0, 1, 2]
    with pytest.raises(
        UserCodeError, match=rf"^method\.weight {name}:broken raised KeyError: 'no' \(in broken, line 6 of .*{name}\.py\)$"
    ):
        OrwCfmW2(weight=f"{name}:broken").weights(rewards)


# ---- what it raises ----


def no_face(x: Tensor) -> Tensor:
    raise ValueError("no face found\nand more")


def test_an_exception_is_one_line_with_its_place() -> None:
    line = no_face.__code__.co_firstlineno + 1
    expected = f"the reward raised ValueError: no face found (in no_face, line {line} of {__file__})"
    with pytest.raises(UserCodeError) as caught:
        evaluate(no_face, torch.zeros(2, 3))
    assert str(caught.value) == expected
    assert isinstance(caught.value.__cause__, ValueError)
    assert "and more" in caught.value.traceback
    with pytest.raises(InputError) as refused:
        try_reward(no_face, torch.zeros(2, 3))
    assert str(refused.value) == expected
    with pytest.raises(
        InputError, match=r"^my reward does not take samples of shape \[3\]: the reward raised RuntimeError: .*size of tensor"
    ):
        try_reward(lambda x: (x + x.new_zeros(7)).sum(1), torch.zeros(2, 3), "my reward")


def test_what_is_going_to_be_dropped_does_not_stop_the_start() -> None:
    """Shape, type and gradient are looked at in any case."""

    def first_is_not(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) % 4 == 0, torch.nan, pure(x))

    for gradient in (False, True):
        for x in (torch.zeros(2, 3), torch.zeros(1, 3)):
            try_reward(first_is_not, x, gradient=gradient, non_finite="drop")
            with pytest.raises(InputError, match=f"the reward is not finite for 1 of {len(x)} samples"):
                try_reward(first_is_not, x, gradient=gradient)
    with pytest.raises(InputError, match="has no gradient"):
        try_reward(lambda x: first_is_not(x).detach(), torch.zeros(2, 3), gradient=True, non_finite="drop")
    with pytest.raises(InputError, match=r"got \[2, 1\]"):
        try_reward(lambda x: first_is_not(x)[:, None], torch.zeros(2, 3), non_finite="drop")


def test_memory_and_our_own_errors_pass_through() -> None:
    def out_of_memory(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def ours(x: Tensor) -> Tensor:
        raise tiltflow.CollapseError("ours")

    with pytest.raises(torch.OutOfMemoryError):
        evaluate(out_of_memory, torch.zeros(2, 3))
    with pytest.raises(tiltflow.CollapseError) as caught:
        evaluate(ours, torch.zeros(2, 3))
    assert caught.value.__cause__ is None


def call(*arguments: str) -> tuple[int, str]:
    """The command in this process: (exit code as `tiltflow.commands.terminal.app.main` has it, what was said)."""
    result = CliRunner().invoke(app, list(arguments))
    error = result.exception
    if isinstance(error, tiltflow.TiltflowError):
        return (2 if isinstance(error, InputError) else 1), str(error)
    return result.exit_code, result.output


def test_an_exception_at_the_start_is_wrong_input_and_leaves_nothing(tmp_path: Path, write: Callable[[str], str]) -> None:
    name = write("def raises(x): raise ValueError('no face found')\n")
    recipe = str(tiny_recipe(tmp_path, reward={"name": "function", "path": f"{name}:raises"}))
    code, said = call("train", recipe, "--output", str(tmp_path / "run"))
    assert code == 2
    assert said == f"the reward raised ValueError: no face found (in raises, line 2 of {tmp_path / name}.py)"
    assert not (tmp_path / "run").exists()
    code, said = call("doctor", recipe)
    assert code == 1
    assert "no face found (in raises, line 2" in said


def test_an_exception_in_the_middle_saves_and_the_run_goes_on_from_there(tmp_path: Path, write: Callable[[str], str]) -> None:
    name = write(
        "calls = 0\nbroken = True\n"
        "def sometimes(x):\n"
        "    global calls\n    calls += 1\n"
        "    if broken and calls == 5: raise ValueError('no face found')\n"
        "    return x.mean((1, 2, 3))\n"
    )
    training = {"max_train_steps": 4, "train_batch_size": 4, "checkpointing_steps": 0}
    recipe = str(tiny_recipe(tmp_path, reward={"name": "function", "path": f"{name}:sometimes"}, training=training))
    run_folder, whole = tmp_path / "run", tmp_path / "whole"
    code, said = call("train", recipe, "--output", str(run_folder), "--quiet")
    assert code == 1
    assert "no face found (in sometimes, line 7" in said
    assert "Traceback" in (run_folder / "diagnostics" / "traceback.txt").read_text()
    saved = int(checkpoints(run_folder / FOLDER)[-1].name.removeprefix("step-"))
    assert 1 <= saved == len((run_folder / "metrics.jsonl").read_text().splitlines()) < 4
    assert tiltflow.load(run_folder).sample(2).shape == (2, 1, 8, 8)
    sys.modules[name].broken = False  # type: ignore[attr-defined]
    assert call("train", recipe, "--output", str(run_folder), "--resume", "--quiet")[0] == 0
    assert call("train", recipe, "--output", str(whole), "--quiet")[0] == 0
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (run_folder, whole))
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---- what it is told ----


def told(*arguments: Any) -> Callable[..., Tensor]:
    """A reward's prompts and metadata as numbers."""
    images, prompts, metadata = arguments
    return images[:, 0] + torch.tensor([10.0 * len(p) + m.get("count", 0) for p, m in zip(prompts, metadata, strict=True)])


def test_prompts_and_metadata_come_by_name() -> None:
    x, prompts, metadata = torch.tensor([[0.1], [0.2]]), ["a", "bb"], [{"count": 3}, {"count": 4}]
    plain, both = torch.tensor([0.1, 0.2]), torch.tensor([13.1, 24.2])
    rewards: list[tuple[Any, Tensor]] = [
        (lambda images: images[:, 0], plain),
        (lambda anything: anything[:, 0], plain),
        (lambda x, scale=1.0: scale * x[:, 0], plain),
        (lambda images, prompts, metadata: told(images, prompts, metadata), both),
        (lambda prompts, images, metadata: told(images, prompts, metadata), both),
        (lambda metadata, prompts, pictures: told(pictures, prompts, metadata), both),
        (lambda images, /, metadata, prompts: told(images, prompts, metadata), both),
        (lambda images, prompts, metadata, /: told(images, prompts, metadata), both),
        (lambda images, *, prompts, metadata: (told(images, prompts, metadata), {"info": 1}), both),
        (lambda images, prompts: told(images, prompts, [{}] * len(images)), torch.tensor([10.1, 20.2])),
        (lambda images, metadata: told(images, [""] * len(images), metadata), torch.tensor([3.1, 4.2])),
        (lambda *anything: anything[0][:, 0], plain),
    ]
    for function, expected in rewards:
        reward = given(from_function(function), prompts, metadata)
        torch.testing.assert_close(evaluate(reward, x), expected)
        torch.testing.assert_close(evaluate(select(reward, torch.tensor([1])), x[1:]), expected[1:])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda images, captions: images,
            r"mine has the arguments \(images, captions\); it can have the images, under any name",
        ),
        (lambda: 0, r"mine has the arguments \(none\)"),
        (lambda prompts, metadata: 0, r"mine has the arguments \(prompts, metadata\)"),
        ("ink", "mine must be a function of samples .*, is str"),
    ],
)
def test_other_arguments_are_refused(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_function(function, "mine")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.0, 1.0], r"must return a tensor, got list; torch.as_tensor\(values\) makes one"),
        (torch.zeros(2).numpy(), "got ndarray; torch.as_tensor"),
        ((torch.zeros(2), {}, 1), "got tuple"),
        ((torch.zeros(3), {}), r"shape \[2\], got \[3\]"),
    ],
)
def test_other_values_are_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(lambda x: value, torch.zeros(2, 1))
    value_and_gradient(lambda x: (x.sum(1), None), torch.zeros(2, 1))


# ---- rewards that are not finite for some samples ----

DETECTOR = """
def face(x):
    v = x.mean((1, 2, 3))
    return torch.where(x[:, 0, 0, 0] < -0.4, torch.nan, v)
"""


def seen(x: Tensor) -> Tensor:
    return ~(x[:, 0, 0, 0] < -0.4)


def test_drop_works_from_the_start_to_the_report(tmp_path: Path, write: Callable[[str], str]) -> None:
    """Check, calibration, monitor, training, evaluation and doctor: the numbers are those of the samples with a reward."""
    name = write(DETECTOR)
    training = {
        "max_train_steps": 2, "train_batch_size": 32, "calibration_samples": 512, "monitor": {"steps": 1, "num_samples": 64},
    }  # fmt: skip
    method = {"name": "score-as-action", "num_inference_steps": 3, "beta": 0.5}
    changes = {"reward": {"name": "function", "path": f"{name}:face"}, "method": method, "optimizer": {"learning_rate": 1e-3}}
    evaluation = {"num_samples": 400, "batch_size": 64}

    def recipe(policy: str) -> Recipe:
        folder = tmp_path / policy
        folder.mkdir(exist_ok=True)
        tree = changes | {"training": training | {"non_finite_rewards": policy}, "evaluation": evaluation}
        return validate(Recipe, read_yaml(tiny_recipe(folder, **tree)), "recipe")

    summary = run(recipe("drop"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["dropped"] > 0
    x = tiltflow.load(tmp_path / "drop" / "flow").sample(400, sampling=recipe("drop").sampling, batch_size=64)
    assert 10 < (~seen(x)).sum() < 200
    r = x[seen(x)].mean((1, 2, 3)).double()
    assert summary["reward_base"] == pytest.approx(r.mean().item(), abs=1e-6)
    weights = torch.softmax(r / 0.5, 0)
    assert summary["reward_target"] == pytest.approx((weights @ r).item(), abs=1e-6)
    assert summary["num_samples"] == 400
    (sentence,) = [each for each in summary["limits"] if "not finite" in each]
    assert f"{int((~seen(x)).sum())} of the base's 400" in sentence
    looks = [json.loads(line) for line in (tmp_path / "run" / "monitor.jsonl").read_text().splitlines()]
    assert all(torch.tensor(look["measures"]["reward"]).isfinite().all() for look in looks)
    findings = {finding.check: finding for finding in examine(recipe("drop"))}
    assert findings["reward"].level == "amber"
    assert "It is finite for" in findings["reward"].text
    assert not [finding for finding in findings.values() if finding.level == "red"]

    with pytest.raises(tiltflow.TiltflowError, match="the reward is not finite for"):
        run(recipe("error"), tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "recipe.yaml").exists()


@dataclass(frozen=True)
class SomeHaveOne:
    """A reward of some samples of a batch, wherever they go."""

    which: Tensor

    def select(self, part: Any) -> SomeHaveOne:
        return SomeHaveOne(self.which[part])

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.which, pure(x), torch.nan)


def gradient_of(method: Any, kept: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, float]]:
    """Of the first step on eight trajectories, of which all but those have no reward."""
    reward = SomeHaveOne(torch.isin(torch.arange(8), torch.tensor(kept)))
    tuned = Flow(Net().requires_grad_(True))
    state = method.new_state((2,), 0, torch.device("cpu"))
    if isinstance(method, tiltflow.ScoreAsAction):
        state.value.fitted = True  # by the rewards that are kept, which would tie the samples to each other
    x = torch.randn(8, 2, generator=stream(0, "start"))
    base = Flow(Net().requires_grad_(False))
    measured = next(iter(iterate(method, tuned, base, reward, x, stream(0, "rollout"), state, non_finite="drop")))
    return torch.cat([cast(Tensor, p.grad).flatten() for p in tuned.parameters()]), measured


@pytest.mark.parametrize("method", ["am", "saa", "saa with a reward in its critic"])
def test_a_gradient_without_some_samples_is_that_of_the_others(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the same trajectories: of three it is the mean over the pairs among them."""
    settings = METHODS.get(method) or tiltflow.ScoreAsAction(
        num_inference_steps=4, estimator="closed-form", critic={"form": "constant-skip"}
    )
    three, measured = gradient_of(settings, [1, 4, 6], monkeypatch)
    pairs = [gradient_of(settings, pair, monkeypatch)[0] for pair in ([1, 4], [4, 6], [1, 6])]
    torch.testing.assert_close(torch.stack(pairs).mean(0), three, rtol=1e-4, atol=1e-5)
    assert three.norm() > 1e-3
    assert measured["dropped"] == 5
    everything, measured = gradient_of(settings, list(range(8)), monkeypatch)
    halves = [gradient_of(settings, half, monkeypatch)[0] for half in ([0, 1, 2, 3], [4, 5, 6, 7])]
    torch.testing.assert_close(torch.stack(halves).mean(0), everything, rtol=1e-4, atol=1e-5)
    assert "dropped" not in measured
    with pytest.raises(tiltflow.NonFiniteError, match="not finite for 7 of 8 samples: too few are left"):
        gradient_of(settings, [3], monkeypatch)


def test_a_round_without_some_samples_is_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    regress = OrwCfmW2._regress

    def watched(self: Any, batch: Any, x1: Tensor, weights: Tensor) -> Any:
        seen.append((x1, weights))
        return regress(self, batch, x1, weights)

    monkeypatch.setattr(OrwCfmW2, "_regress", watched)
    settings = tiltflow.OrwCfmW2(num_inference_steps=4, min_effective_sample_size=1)
    _, whole = gradient_of(settings, list(range(8)), monkeypatch)
    _, measured = gradient_of(settings, [1, 4, 6], monkeypatch)
    (x1, _), (part, weights) = seen
    assert torch.equal(part, x1[[1, 4, 6]])
    torch.testing.assert_close(weights, 3 * torch.softmax(pure(part), 0))
    assert (measured["dropped"], "dropped" in whole) == (5, False)


def test_a_constant_reward_is_said_once() -> None:
    def constant(x: Tensor) -> Tensor:
        return 0 * x.sum(1) + 2

    for method in ("am", "saa"):
        with pytest.warns(UserWarning, match="the reward is 2 for all 8 samples of the first batch: nothing") as said:
            weights(constant, METHODS[method])
        assert len([one for one in said if "the reward is 2" in str(one.message)]) == 1
    with pytest.raises(InputError, match="the reward is 2 for all 8 samples"):
        weights(constant, METHODS["orw"])


def test_pictures_that_stand_for_the_laws() -> None:
    nan = torch.nan
    base = {"own": torch.tensor([1.0, nan, 2, 3, 4, 5, 6, 7, nan, nan, nan, 8]), "other": torch.zeros(12)}
    tuned = {"own": torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]), "other": torch.zeros(12)}
    tuned["other"][6] = nan
    asked = Asked.of_prompts([Item("a"), Item("b"), Item("c")], 4)
    of_base, of_tuned, groups = kept(asked, base, tuned)
    assert of_base.tolist() == [0, 2, 3, 4, 5, 6]  # three of two prompts are more than one of all three
    assert of_tuned.tolist() == [0, 1, 2, 4, 5, 7]
    assert (groups.groups, groups.size, [item.text for item in groups.items[::3]]) == (2, 3, ["a", "b"])
    whole, _, groups = kept(asked, {"own": torch.zeros(12)}, {"own": torch.zeros(12)})
    assert (whole.tolist(), groups) == (list(range(12)), asked)
    with pytest.raises(tiltflow.NonFiniteError, match="at most one picture of each prompt"):
        kept(Asked.of_prompts([Item("a"), Item("b")], 2), {"own": torch.full((4,), nan)}, {"own": torch.zeros(4)})


def test_drop_on_pipelines(tmp_path: Path, write: Callable[[str], str]) -> None:
    pytest.importorskip("diffusers")
    from tiny_pipelines import tiny_pipeline

    name = write(
        "def face(images, prompts, metadata):\n"
        "    assert [m['id'] for m in metadata] == [len(p) for p in prompts]\n"
        "    v = images.mean((1, 2, 3))\n"
        "    odd = (images[:, 0, 0, 0] * 1e4).round() % 4 == 0\n"
        "    return torch.where(odd, torch.nan, v), {'faces': 1}\n"
    )
    tiny_pipeline("stable-diffusion", tmp_path).save_pretrained(tmp_path / "pipe")
    rows = [{"prompt": text, "id": len(text)} for text in ("a red cat", "a blue dog", "a green hat")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree: dict[str, Any] = {
        "model": {"diffusers": str(tmp_path / "pipe"), "height": 16, "width": 16, "adapter": {"rank": 2}},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "validation": 0.34},
        "reward": {"name": "function", "path": f"{name}:face"},
        "method": {"name": "score-as-action", "num_inference_steps": 2, "solver": "ddpm"},
        "training": {
            "max_train_steps": 2, "prompts_per_step": 2, "num_generations": 8, "per_prompt_normalization": 8,
            "non_finite_rewards": "drop", "monitor": {"steps": 1},
        },
        "evaluation": {"num_prompts": 1, "num_generations": 8, "points": [{"num_inference_steps": 2}]},
    }  # fmt: skip
    summary = run(validate(Recipe, tree, "recipe"), tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("dropped", 0) > 0 for row in metrics)
    numbers = [summary["reward_base"], summary["reward_tuned"], *(row["function"] for row in summary["table"])]
    assert torch.tensor(numbers).isfinite().all()
    assert any("not finite" in each for each in summary["limits"])
