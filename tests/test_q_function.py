"""Critics of a policy: their targets by hand, their fixed point, and runs in which they learn beside the policy."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from replays import replay
from safetensors.torch import load_file
from test_policy import cloned, recipe
from test_resume import Killed, final, killed_after, resuming, same_runs
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.errors import InputError
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.models.policy import load_policy
from tiltflow.networks.critic_ensemble import CriticEnsemble
from tiltflow.problems.linear_quadratic import LinearQuadratic
from tiltflow.rewards import LearnedReward
from tiltflow.rewards.q_function import QFunction, QReward
from tiltflow.runs.doctor import examine
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import evaluate_run, run
from tiltflow.settings import dump_yaml, validate
from tiltflow.streams import new_network, stream

SMALL: dict[str, Any] = {"hidden": 16, "layers": 1, "members": 2}
STILL = FunctionField(lambda x, t: torch.zeros_like(x))


def q_reward(path: Path, **settings: Any) -> QReward:
    return QFunction(**{"data": str(path), **SMALL, **settings}).build()


def at(reward: QReward, observations: Tensor) -> QReward:
    """The reward of samples at these observations."""
    rows = [{"observation": tuple(row)} for row in observations.tolist()]
    return reward.given([""] * len(rows), rows)


class Stub(nn.Module):
    """Critic j has the value j + (j + 1) sum(a) + s_1."""

    def forward(self, x: Tensor, observations: Tensor) -> Tensor:
        j = torch.arange(3.0)[:, None]
        return j + (j + 1) * x.sum(1) + observations[:, 0]


def test_the_targets_by_hand(tmp_path: Path) -> None:
    """Of a policy that goes straight to the first numbers of what it observes, its last action beyond 1."""
    observations = np.array([[0, 0], [0, 0], [0.5, 3], [9, 9]], np.float32)
    rewards, masks = np.array([1.0, 2, 9, 9]), np.ones(4)
    path = replay(tmp_path / "data.npz", episodes=(4,), observations=observations, action=1, rewards=rewards, masks=masks)
    reward = q_reward(path, horizon=2, discount=0.5, pessimism=0.5)
    assert isinstance(reward, LearnedReward)
    reward.network["target"] = Stub()  # type: ignore[index, operator]
    policy = Flow(lambda x, time, seen: (seen - x) / (1 - time[:, None]))
    found = reward.targets(torch.tensor([0]), policy, stream(0))
    after = torch.tensor([0, 1, 2.0]) + torch.tensor([1, 2, 3.0]) * (0.5 + 1.0) + 0.5  # at (0.5, 1): clipped
    expected = 1 + 0.5 * 2 + 0.25 * (after.mean() - 0.5 * after.std(correction=0))
    assert found.tolist() == pytest.approx([expected.item()])


def test_the_best_of_several_next_actions_by_hand(tmp_path: Path) -> None:
    """Of a policy that keeps its noise: the value of the largest, as the mean of the stub's values rises with the action."""
    rewards, masks = np.zeros(8), np.ones(8)
    path = replay(tmp_path / "data.npz", episodes=(4, 4), action=1, rewards=rewards, masks=masks)
    reward = q_reward(path, horizon=1, discount=0.5, pessimism=0.0, best_of=3)
    reward.network["target"] = Stub()  # type: ignore[index, operator]
    rows = torch.tensor([0, 5])
    found = reward.targets(rows, STILL, stream(0))
    best = torch.randn(6, 1, generator=stream(0)).clamp(-1, 1).reshape(2, 3).max(1).values
    after = reward.transitions.observations[rows + 1, 0]
    assert_close(found, 0.5 * (1 + 2 * best + after))


def test_a_step_moves_the_critics_and_their_targets_a_little(tmp_path: Path) -> None:
    reward = q_reward(replay(tmp_path / "data.npz", episodes=(40,)), horizon=2, target_decay=0.9, learning_rate=1e-2)
    before = copy.deepcopy(reward.network.state_dict())
    assert_close(before["online.head.weight"], before["target.head.weight"], rtol=0, atol=0)
    loss = reward.learn(torch.zeros(0), STILL, stream(3))
    after = reward.network.state_dict()
    moved = after["online.head.weight"] - before["online.head.weight"]
    assert moved.abs().max().item() == pytest.approx(1e-2, rel=1e-3)  # Adam's first step is the learning rate
    assert_close(after["target.head.weight"] - before["target.head.weight"], 0.1 * moved)
    assert loss["reward_loss"] > 0
    values = (after["online.observations.mean"], after["target.observations.mean"])
    assert_close(*values, rtol=0, atol=0)


@pytest.mark.parametrize(("over", "value"), [(0.0, 1.0), (1.0, 2.0)])
def test_its_fixed_point_is_the_discounted_return(tmp_path: Path, over: float, value: float) -> None:
    """Of rewards of 1 at a discount of 1/2: 1 + 1/2 + 1/4 .. = 2, and 1 where the task is over after each step."""
    ones = np.ones(80)
    path = replay(tmp_path / "data.npz", episodes=(40, 40), rewards=ones, masks=over * ones)
    more = {"horizon": 1, "discount": 0.5, "learning_rate": 1e-2, "target_decay": 0.5, "pessimism": 0.0}
    reward = q_reward(path, train_batch_size=32, num_steps=250, num_inference_steps=1, **more)
    reward.learn(torch.zeros(0), STILL, stream(0))
    values = at(reward, torch.randn(50, 3, generator=stream(9)))(torch.zeros(50, 2))
    assert values.mean().item() == pytest.approx(value, abs=0.1)


def test_members_are_critics_of_their_own() -> None:
    """Each the perceptron that torch's own functions make of its weights."""
    settings = CriticEnsemble(observation_dim=3, actions=2, members=4, hidden=8, layers=2)
    network: Any = new_network(settings, 0)
    for layer in network.body:
        nn.init.normal_(layer.scale, generator=stream(1))
        nn.init.normal_(layer.shift, generator=stream(2))
    x, seen = torch.randn(5, 2, generator=stream(3)), torch.randn(5, 3, generator=stream(4))
    found = network(x, seen)
    assert found.shape == (4, 5)
    for j in range(4):
        h = torch.cat([x, seen], 1)
        for layer in network.body:
            h = F.gelu(h @ layer.linear.weight[j] + layer.linear.bias[j])
            h = F.layer_norm(h, (8,), layer.scale[j, 0], layer.shift[j, 0])
        assert_close(found[j], (h @ network.head.weight[j] + network.head.bias[j])[:, 0])
    assert found.std(0).min() > 0


def test_beyond_the_largest_action_there_is_no_slope(tmp_path: Path) -> None:
    reward = q_reward(replay(tmp_path / "data.npz"), horizon=1)
    x = torch.tensor([[0.5, 1.5], [-1.2, -0.3]], requires_grad=True)
    seen = torch.randn(2, 3, generator=stream(1))
    values = at(reward, seen)(x)
    assert_close(values, at(reward, seen)(x.clamp(-1, 1)))
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert ((slope != 0) == torch.tensor([[True, False], [False, True]])).all()
    assert_close(at(reward, seen).select(slice(1, 2))(x[1:]), values[1:])


def test_what_it_cannot_value_is_refused(tmp_path: Path) -> None:
    path = replay(tmp_path / "data.npz", episodes=(4, 4))
    reward = q_reward(path, horizon=2)
    with pytest.raises(InputError, match="bound to no observations; it is for the actions of a policy"):
        reward(torch.zeros(1, 4))
    with pytest.raises(InputError, match=r"samples of shape \[3\], but chunks of 2 actions of 2 numbers"):
        at(reward, torch.zeros(1, 3))(torch.zeros(1, 3))
    for metadata in (None, [{}], [{"observation": (0.0, 1.0)}]):
        with pytest.raises(InputError, match="values actions at observations of 3 numbers, conditions of a policy"):
            reward.given(["a cat"], metadata)
    with pytest.raises(InputError, match="horizon 4: the longest episode has 3 steps"):
        q_reward(path, horizon=4)
    with pytest.raises(InputError, match="has no masks; a value is learned from the rewards of each step"):
        q_reward(replay(tmp_path / "other.npz", masks=None))


# ---- runs ----


def of_critics(folder: Path, **changes: Any) -> Any:
    cloned(folder)
    reward = {"name": "q-function", "data": str(folder / "data.npz"), "horizon": 2, "num_inference_steps": 2, **SMALL}
    training = {"max_train_steps": 6, "prompts_per_step": 6, "num_generations": 1, "checkpointing_steps": 2}
    return recipe(folder, reward=reward, training=training | changes)


def test_a_run_in_which_they_learn_is_bitwise_the_one_that_was_killed(tmp_path: Path) -> None:
    of_run = of_critics(tmp_path, ema_decay=0.5)
    summary = run(of_run, tmp_path / "whole")
    with pytest.raises(Killed):
        run(resuming(of_run), tmp_path / "parts", callbacks=[killed_after(5)])
    run(resuming(of_run), tmp_path / "parts")
    same_runs(tmp_path / "whole", tmp_path / "parts")
    assert "reward" in final(tmp_path / "parts")
    assert any("learned along the way" in limit for limit in summary["limits"])
    again = evaluate_run(tmp_path / "whole")
    assert again["reward_tuned"] == summary["reward_tuned"]  # by the critics that were learned


@pytest.mark.parametrize(
    "method",
    [
        {"name": "score-as-action", "num_inference_steps": 4},
        {"name": "rwr", "num_inference_steps": 4},
        {"name": "raft", "num_inference_steps": 4, "n": 3},
        {"name": "fql", "num_inference_steps": 2},
        {"name": "fbrac", "num_inference_steps": 2},
        {"name": "rebrac", "num_inference_steps": 2},
    ],
    ids=lambda method: method["name"],
)
def test_they_learn_beside_other_methods(tmp_path: Path, method: dict[str, Any]) -> None:
    """And a run that was killed is the one that was not."""
    tree = of_critics(tmp_path, prompts_per_step=2, num_generations=3).model_dump(mode="json", exclude_none=True)
    of_run = validate(Recipe, {**tree, "method": method, "optimizer": {}}, "recipe")
    run(of_run, tmp_path / "whole")
    with pytest.raises(Killed):
        run(resuming(of_run), tmp_path / "parts", callbacks=[killed_after(5)])
    run(resuming(of_run), tmp_path / "parts")
    same_runs(tmp_path / "whole", tmp_path / "parts")
    reward = QFunction.model_validate(tree["reward"]).build().network.state_dict()
    learned = load_file(tmp_path / "whole" / "reward.safetensors")
    assert not torch.equal(learned["target.head.weight"], reward["target.head.weight"])
    before, after = (load_policy(tmp_path / name).flow.network.state_dict()["head.weight"] for name in ("policy", "whole"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"name": "dxmi"},
            "^method dxmi needs a critic that knows the observation, and ours sees actions alone; use score-as-",
        ),
        (
            {"name": "raft"},
            r"training.num_generations 1 teaches nothing: the best of 4 samples of a prompt, .*; give 4 or more$",
        ),
    ],
)
def test_methods_that_cannot_tune_a_policy_are_refused(tmp_path: Path, method: dict[str, Any], message: str) -> None:
    tree = of_critics(tmp_path).model_dump(mode="json", exclude_none=True)
    with pytest.raises(InputError, match=message):
        run(validate(Recipe, {**tree, "method": method, "optimizer": {}}, "recipe"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_budget_of_kl_sets_the_temperature(tmp_path: Path) -> None:
    """As in TRQAM: what is given is how far the policy may go."""
    summary = run(of_critics(tmp_path, target_kl=0.3, max_train_steps=4), tmp_path / "run")
    assert summary["target_kl"] == 0.3
    assert summary["working_beta"] != 1.0


def test_the_doctor_examines_it(tmp_path: Path) -> None:
    """Its critics learn on tensors without memory too. A policy that is hardly trained is not the field of its law."""
    levels = {finding.check: finding.level for finding in examine(of_critics(tmp_path))}
    assert {levels[name] for name in ("parts", "reward", "gradient", "memory", "iteration")} == {"green"}
    assert levels["denoising"] != "green"


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    path, weights = tmp_path / "recipe.yaml", []
    path.write_text(dump_yaml(of_critics(tmp_path).model_dump(mode="json", exclude_none=True)))
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    for name, program in (("one", []), ("two", launch)):
        words = [*program, "-m", "tiltflow", "train", str(path), "-o", str(tmp_path / name), "--quiet", "--threads", "1"]
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        files = [tmp_path / name / file for file in ("model/model.safetensors", "reward.safetensors")]
        weights.append({f"{file.name} {key}": value for file in files for key, value in load_file(file).items()})
    assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_its_values_are_those_of_a_regulator(tmp_path: Path) -> None:
    """Of a linear system under a Gaussian feedback, whose value is quadratic in closed form: actions beside the mean one."""
    problem, rng, episodes, steps = LinearQuadratic(scale=0.25), np.random.default_rng(0), 400, 40
    state, rows = rng.normal(size=episodes), dict[str, list[Any]](observations=[], actions=[], rewards=[])
    for _ in range(steps):
        action = -problem.feedback * state + problem.scale * rng.normal(size=episodes)
        cost = (problem.state_cost * state**2 + problem.action_cost * action**2) / 2
        for values, value in zip(rows.values(), (state, action, -cost), strict=True):
            values.append(value)
        state = problem.drift * state + problem.gain * action
    arrays = {key: np.stack(values, 1).reshape(-1) for key, values in rows.items()}
    columns = {key: arrays[key][:, None] for key in ("observations", "actions")}
    masks = np.ones(episodes * steps)
    path = replay(tmp_path / "data.npz", episodes=(steps,) * episodes, **arrays | columns, masks=masks)
    more = {"discount": problem.discount, "pessimism": 0.0, "learning_rate": 2e-3, "target_decay": 0.98, "num_steps": 3000}
    reward = q_reward(path, horizon=1, hidden=64, layers=2, num_inference_steps=5, **more)
    reward.learn(torch.zeros(0), problem.base_flow(), stream(0))
    errors = []
    for s in (-0.8, 0.0, 0.8):
        actions = torch.tensor([[-0.6], [-0.3], [0.3], [0.6]]) - problem.feedback * s
        zero = torch.full((4, 1), -problem.feedback * s)
        value = at(reward, torch.full((4, 1), s))
        exact = problem.value(s)
        errors.append((value(actions) - value(zero)).double() - (exact(actions.double()) - exact(zero.double())))
    assert torch.cat(errors).square().mean().sqrt().item() < 0.06


@pytest.mark.slow
def test_cloned_learned_and_tuned_it_is_the_tilted_law(tmp_path: Path) -> None:
    """Of a bandit: a ~ N(0, 0.3^2) whatever is seen, worth r = 2 s_1 a, once. At a temperature of 1/2 the law is
    N(0.36 s_1, 0.3^2)."""
    rng = np.random.default_rng(0)
    count = 20_000
    observations, actions = rng.uniform(-1, 1, (count, 2)), 0.3 * rng.normal(size=(count, 1))
    arrays = {"rewards": 2 * observations[:, 0] * actions[:, 0], "masks": np.zeros(count)}
    path = replay(tmp_path / "data.npz", episodes=(2,) * (count // 2), observations=observations, actions=actions, **arrays)
    more = ["horizon=1", "hidden=64", "training.max_train_steps=1500", "training.learning_rate=3e-3"]
    cloned(tmp_path, *more, "training.ema_decay=0.99", data=path)
    own = {"horizon": 1, "members": 2, "hidden": 64, "layers": 2, "learning_rate": 1e-3, "num_inference_steps": 4}
    of_run = recipe(
        tmp_path,
        reward={"name": "q-function", "data": str(path), **own},
        method={"name": "adjoint-matching", "beta": 0.5, "num_inference_steps": 15},
        optimizer={"learning_rate": 1e-3},
        training={"max_train_steps": 1000, "prompts_per_step": 128, "num_generations": 1, "ema_decay": 0.99},
        sampling={"num_inference_steps": 30},
    )
    run(of_run, tmp_path / "run")
    base, tuned = load_policy(tmp_path / "policy"), load_policy(tmp_path / "run")
    for seen in (-0.8, 0.0, 0.8):
        given = torch.tensor([[seen, 0.2]]).repeat(4000, 1)
        before, after = (each.act(given, sampling=of_run.evaluation.first.sampling)[:, 0, 0] for each in (base, tuned))
        assert (after.mean() - before.mean()).item() == pytest.approx(0.36 * seen, abs=0.05)
        assert after.std().item() == pytest.approx(0.3, abs=0.03)
