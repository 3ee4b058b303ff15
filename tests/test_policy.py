"""A policy: a flow of actions given an observation, cloned from data, sampled, tuned and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replays import replay
from torch import Tensor

import tiltflow
from tiltflow.api import observations_of
from tiltflow.conditions.observations import Observations
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.models.model import load
from tiltflow.models.policy import Policy, load_policy
from tiltflow.networks.policy_mlp import PolicyMlp, PolicyMlpModule
from tiltflow.policies.transitions import load_transitions
from tiltflow.pretraining.recipe import read_pretraining
from tiltflow.pretraining.run import run_pretraining, score_again
from tiltflow.pretraining.tasks.policy import PolicyPretraining, split
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import evaluate_run, run
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import validate
from tiltflow.streams import new_network, stream
from tiltflow.training.draw import batches
from tiltflow.training.settings import Training

SMALL = ["hidden=32", "layers=2", "horizon=2", "training.max_train_steps=3"]


def cloned(folder: Path, *overrides: str, data: Path | None = None) -> Path:
    """A policy from a small data set; hardly trained."""
    path = data or replay(folder / "data.npz", episodes=(12,) * 12)
    run_pretraining(read_pretraining("behaviour-policy", [*SMALL, *overrides]), path, folder / "policy", name="cloned")
    return folder / "policy"


def a_policy(observation_dim: int = 3) -> Policy:
    """A policy that does not look at its time and has actions near its observation."""
    settings = PolicyMlp(observation_dim=observation_dim, action_dim=2, horizon=2, hidden=8, layers=1)
    network = new_network(settings, 0)
    torch.nn.init.normal_(network.head.weight, generator=stream(0))  # type: ignore[arg-type, union-attr]
    sampling = Sampling(solver="euler", num_inference_steps=4)
    return Policy(Flow(network), (4,), sampling, settings, observation_dim=observation_dim, horizon=2)


def test_a_sample_is_of_its_observation_alone() -> None:
    policy, observations = a_policy(), torch.randn(5, 3, generator=stream(1))
    actions = policy.act(observations)
    assert actions.shape == (5, 2, 2)
    others = observations.clone()
    others[3:] += 1
    again = policy.act(others)
    assert torch.equal(again[:3], actions[:3])
    assert not torch.isclose(again[3:], actions[3:]).any()
    items = observations_of(observations, 3, "tune")
    assert torch.equal(policy.draw(items).reshape(5, 2, 2), actions)


def test_observations_are_seen_in_standard_deviations() -> None:
    network = new_network(PolicyMlp(observation_dim=3, action_dim=2, hidden=8, layers=1), 0)
    assert isinstance(network, PolicyMlpModule)
    torch.nn.init.normal_(network.head.weight, generator=stream(0))
    x, time, seen = torch.randn(4, 2), torch.rand(4), torch.randn(4, 3)
    expected = network(x, time, seen)
    scale, shift = torch.tensor([2.0, 3.0, 1.0]), torch.tensor([1.0, -1.0, 5.0])
    data = torch.tensor([[-1.0, -1, 0], [1, 1, 0]]) * scale + shift  # the last number never changes
    network.observations.fit(data)
    assert torch.allclose(network(x, time, seen * scale + shift), expected, atol=1e-6)


def test_cloned_actions_have_the_law_of_the_data(tmp_path: Path) -> None:
    """Actions are N(o_1 / 2, 0.3^2), and the same in both numbers."""
    rng = np.random.default_rng(1)
    observations = rng.normal(size=(4000, 3))
    actions = (observations[:, :1] / 2 + 0.3 * rng.normal(size=(4000, 1))).repeat(2, 1)
    path = replay(tmp_path / "data.npz", episodes=(500,) * 8, observations=observations, actions=actions)
    more = ["horizon=1", "hidden=48", "training.max_train_steps=300", "training.learning_rate=5e-3", "training.ema_decay=0.98"]
    policy = load_policy(cloned(tmp_path, *more, data=path))
    for seen in (-1.0, 0.5):
        sampled = policy.act(torch.tensor([[seen, 0.3, -0.2]]).repeat(400, 1))[:, 0]
        assert sampled.mean(0).tolist() == pytest.approx([seen / 2] * 2, abs=0.1)
        assert sampled.std(0).tolist() == pytest.approx([0.3] * 2, abs=0.08)
        assert (sampled[:, 0] - sampled[:, 1]).abs().median() < 0.1


def test_a_folder_and_a_recipe_give_the_policy_again(tmp_path: Path) -> None:
    folder = cloned(tmp_path)
    policy = tiltflow.load(folder)
    assert isinstance(policy, Policy)
    assert (policy.observation_dim, policy.horizon, policy.event_shape) == (3, 2, (4,))
    card = (folder / "README.md").read_text()
    assert "held_out_loss" in card
    assert "144 rows of 12 episodes, 110 chunks to train on" in card
    assert not torch.equal(policy.flow.network.observations.mean, torch.zeros(3))  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"is a policy; in a recipe write `model: \{name: policy, path: "):
        load(folder)
    with pytest.raises(InputError, match="digits-flow: is no policy, whose network takes observations"):
        load_policy("digits-flow")
    with pytest.raises(InputError, match=r"policy\.act\(observations\)"):
        policy.sample(3)


def test_a_policy_is_measured_again(tmp_path: Path) -> None:
    folder, data = cloned(tmp_path), tmp_path / "data.npz"
    before = run_pretraining(read_pretraining("behaviour-policy", SMALL), data, tmp_path / "again", name="cloned")
    assert score_again(read_pretraining("behaviour-policy", SMALL), data, folder)["held_out_loss"] == before["held_out_loss"]
    with pytest.raises(InputError, match="has another network than the recipe"):
        score_again(read_pretraining("behaviour-policy", [*SMALL, "hidden=16"]), data, folder)


def test_every_tenth_episode_is_held_out(tmp_path: Path) -> None:
    data = load_transitions(replay(tmp_path / "data.npz", episodes=(4,) * 11))
    train, out = split(data, 2)
    assert out.tolist() == [36, 37]
    assert len(train) == 20
    assert not set(train.tolist()) & {36, 37}


def test_the_loss_by_hand(tmp_path: Path) -> None:
    """A network of zeros has the mean square of data minus noise as its loss: 1 + E a^2."""
    path = replay(tmp_path / "data.npz", episodes=(500,) * 4)
    task = PolicyPretraining(horizon=3, hidden=4, layers=1).prepare(path, "cpu")
    losses = task.loss(task.train.repeat(10), stream(0))
    squares = task.transitions.chunks(task.train, 3).square().mean()
    assert losses.shape == (10 * len(task.train),)
    assert losses.mean().item() == pytest.approx(1 + squares.item(), rel=0.02)


def recipe(folder: Path, **changes: Any) -> Recipe:
    tree = {
        "model": {"name": "policy", "path": str(folder / "policy")},
        "conditions": {"name": "observations", "data": str(folder / "data.npz"), "num_held_out": 8},
        "reward": {"name": "norm"},
        "method": {"name": "adjoint-matching", "num_inference_steps": 4},
        "training": {"max_train_steps": 2, "prompts_per_step": 6, "num_generations": 1},
        "sampling": {"num_inference_steps": 4},
        "evaluation": {"num_prompts": 4, "num_generations": 8},
    }
    return validate(Recipe, tree | changes, "recipe")


def test_a_policy_is_tuned_by_a_recipe(tmp_path: Path) -> None:
    cloned(tmp_path)
    summary = run(recipe(tmp_path), tmp_path / "run")
    assert summary["num_observations"] == 4
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Held-out observations: 4." in report
    assert "Held-out prompts" not in report
    assert summary["num_samples"] == 32
    assert np.isfinite(summary["reward_tuned"])
    again = evaluate_run(tmp_path / "run")
    assert again["reward_tuned"] == summary["reward_tuned"]
    assert isinstance(tiltflow.load(tmp_path / "run"), Policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": None}, r"a policy draws actions for observations; give \{name: observations, data: \.\.\}"),
        ({"conditions": {"name": "labels"}}, "a policy draws actions for observations"),
        ({"model": {"name": "policy", "path": "digits-flow"}}, "digits-flow: is no policy"),
        ({"model": "digits-flow"}, r"this model has no prompts; leave it out"),
    ],
)
def test_what_does_not_go_with_a_policy_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    cloned(tmp_path)
    with pytest.raises(InputError, match=message):
        run(recipe(tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_observations_of_a_batch_are_drawn_at_random(tmp_path: Path) -> None:
    """Each from all, with its own condition; the same for the same generator."""
    seen = torch.arange(5.0)[:, None].expand(5, 3)
    policy, training = a_policy(), Training(prompts_per_step=400, num_generations=2).for_prompts(guided=False)
    items = observations_of(seen, 3, "tune")
    draw = batches(policy, items, lambda x: x[:, 0], AdjointMatching(num_inference_steps=4), training)
    drawn = draw(stream(3))
    rows = drawn.bind(policy.flow).condition[:, 0]
    assert torch.equal(rows[::2], rows[1::2])
    counts = rows[::2].long().bincount(minlength=5)
    assert ((counts - 80).abs() < 4 * (400 * 0.2 * 0.8) ** 0.5).all()
    assert torch.equal(draw(stream(3)).bind(policy.flow).condition[:, 0], rows)


def test_observations_of_another_size_are_refused(tmp_path: Path) -> None:
    cloned(tmp_path)
    other = {"name": "observations", "data": str(replay(tmp_path / "other.npz", observation=4))}
    with pytest.raises(InputError, match="observations of 4 numbers, and the policy sees 3"):
        run(recipe(tmp_path, conditions=other), tmp_path / "run")


def test_observations_are_held_out(tmp_path: Path) -> None:
    path = replay(tmp_path / "data.npz", episodes=(6, 6))
    train, out = Observations(data=str(path), num_held_out=3).items(())
    assert len(train) == 9
    assert len(out) == 3
    assert len({item.text for item in [*train, *out]}) == 12
    observations = load_transitions(path).observations
    row = int(out[0].text.removeprefix("observation "))
    assert out[0].metadata["observation"] == tuple(observations[row].tolist())
    assert [item.text for item in train[1:3]] == [train[1].text, train[2].text]
    half = Observations(data=str(path)).items(())
    assert [len(part) for part in half] == [6, 6]


def test_tune_takes_observations() -> None:
    """A reward that pulls all actions up: they go up, for each of the observations."""

    def up(x: Tensor) -> Tensor:
        return x.sum(1)

    policy, observations = a_policy(), torch.randn(4, 3, generator=stream(1))
    training = Training(max_train_steps=20, prompts_per_step=4, num_generations=16)
    method = AdjointMatching(num_inference_steps=4, beta=1.0)
    optimizer = tiltflow.Optimizer(learning_rate=1e-2)
    tuned = tiltflow.tune(policy, up, method, training, optimizer=optimizer, conditions=observations)
    many = observations.repeat_interleave(50, 0)
    gain = (tuned.act(many) - policy.act(many)).sum((1, 2)).reshape(4, 50).mean(1)
    assert bool((gain > 0.3).all())
    for wrong, message in ((None, "a policy needs conditions=observations"), (torch.zeros(4, 2), r"got \[4, 2\]")):
        with pytest.raises(InputError, match=message):
            tiltflow.tune(policy, up, method, training, conditions=wrong)
