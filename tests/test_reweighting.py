"""RWR and RAFT: their rounds against the laws that they name, with a perfect fit and on the line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from perfect_fit import BASE, COUNT, CPU, Affine, bowl, fitted_round, slope
from tiny import iterate

from tiltflow.errors import CollapseError, InputError
from tiltflow.flows.flow import Flow
from tiltflow.laws.other_laws import best_of
from tiltflow.methods.raft import Raft
from tiltflow.methods.regressions.drawn_samples import Rounds
from tiltflow.methods.rwr import Rwr
from tiltflow.problems.two_modes import TwoModes
from tiltflow.streams import stream


@pytest.mark.parametrize(("proposal", "variances"), [("base", (0.5, 0.5, 0.5)), ("tuned", (0.5, 1 / 3, 0.25))])
def test_rwr_tilts_once_or_again_and_again(proposal: Any, variances: tuple[float, ...]) -> None:
    """N(0, 1) exp(-n x^2 / 2) is N(0, 1 / (n + 1))."""
    tuned, state = Affine(), Rounds(CPU)
    for i, expected in enumerate(variances):
        fitted_round(Rwr(proposal=proposal, neighbours=64), tuned, bowl, state, i)
        assert tuned.law[1] == pytest.approx(expected, abs=0.02)
        method = Rwr(proposal=proposal)
        told = method.target((i + 1) * method.num_passes)
        assert told.temperature == pytest.approx(1.0 if proposal == "base" else 1 / (i + 1))


def test_raft_learns_the_best_of_n() -> None:
    """Of N(m, S) under x the best of 2 has the mean m + sqrt(S / pi) and the variance S (1 - 1 / pi), and affine fields see no
    more of a law; that of 4, of N(0, 1), 1.0294 and .4917."""
    method, tuned, state = Raft(n=2, neighbours=64), Affine(), Rounds(CPU)
    for i, (mean, variance) in enumerate(((0.5642, 0.6817), (1.0300, 0.4647))):
        shuffled_round(method, tuned, state, i)
        assert tuned.law == (pytest.approx(mean, abs=0.02), pytest.approx(variance, abs=0.03))
    assert shuffled_round(Raft(n=4, proposal="base", neighbours=64), tuned, Rounds(CPU), 0)["largest_weight"] == 4
    assert tuned.law == (pytest.approx(1.0294, abs=0.02), pytest.approx(0.4917, abs=0.03))


def shuffled_round(method: Any, tuned: Affine, state: Rounds, seed: int) -> dict[str, float]:
    """A round whose sets are of samples in random order: `fitted_round` has them from the least to the largest."""
    order = torch.randperm(COUNT, generator=stream(seed, "order"))
    return fitted_round(Mixed(method, order), tuned, slope, state, seed)


class Mixed:
    """A method that draws its samples from starting points in another order."""

    def __init__(self, method: Any, order: torch.Tensor):
        self.method, self.order = method, order

    def model_copy(self, *, update: dict[str, Any]) -> Mixed:
        return Mixed(self.method.model_copy(update=update), self.order)

    def gradients(self, batch: Any, state: Any) -> Any:
        from dataclasses import replace

        return self.method.gradients(replace(batch, x=batch.x[self.order]), state)


def test_the_weights() -> None:
    """The first of the best of each set, over the share that they are; what fills no set is left out, class by class."""
    rewards = torch.tensor([1.0, 5.0, 3.0, 3.0, 9.0, 0.0, 2.0])
    members = [torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 5])]
    assert Raft(n=2)._weights(rewards, members).tolist() == [0, 0, 2, 2, 3, 0, 0]
    weights = Rwr(beta=2.0)._weights(rewards, members)
    expected = torch.exp(rewards.double() / 2)
    for some in members:
        torch.testing.assert_close(weights[some], expected[some] / expected[some].mean())


def test_the_law_of_raft() -> None:
    """The best of n^m after m rounds, of samples of the base once."""
    base, reward = TwoModes().law(), TwoModes().reward_at
    for method, steps, best in (
        (Raft(n=4), 32, 16),
        (Raft(n=4, batches_per_round=2), 33, 16),
        (Raft(n=3, proposal="base"), 99, 3),
    ):
        target = method.target(steps)
        assert target.law(base, reward).expectation(np.tanh) == best_of(base, reward, best).expectation(np.tanh)
        assert (target.reaches, target.words) == ("none", f"the law of the best of {best} samples of the base")
    # frontier values of the best of 2 and of 16 on two modes
    for n, expected in ((2, 0.46321), (16, 0.97082)):
        law = Raft(n=n, proposal="base").target(1).law(base, reward)
        assert law.expectation(np.tanh) == pytest.approx(expected, abs=3e-4)


def test_a_round_of_several_batches_is_drawn_from_the_weights_at_its_start() -> None:
    for kind in (Rwr, Raft):
        method = kind(proposal="tuned", batches_per_round=3, num_passes=1, num_inference_steps=5)
        tuned, state, rewards = Affine(), Rounds(CPU), []
        for i in range(6):
            x = torch.linspace(-2, 2, 64)[:, None]
            steps = iterate(method, Flow(tuned), Flow(BASE), slope, x, stream(i), state, parameters=(tuned.offset, tuned.slope))
            (measured,) = steps
            tuned.offset.data += 0.1
            rewards.append(measured["reward"])
            again = Rounds(CPU)
            again.load_state_dict(state.state_dict())
            assert (again.batches, len(again.old)) == (i + 1, 0 if i in (2, 5) else 2)
        assert rewards[:3] == [pytest.approx(0, abs=1e-6)] * 3
        assert rewards[3] == rewards[4] == rewards[5] > 0.1


def test_words_and_refusals() -> None:
    assert (Rwr().target(9).reaches, Rwr().target(9).caveats, Rwr().temperature) == ("exact", (), 1.0)
    iterated = Rwr(preset="ddpo-baseline")
    assert (iterated.beta, iterated.proposal, iterated.num_passes, iterated.temperature) == (0.2, "tuned", 5, None)
    assert iterated.optimizer_defaults == {"learning_rate": 1e-5, "max_grad_norm": 1.0}
    assert "the law after 3 rounds" in iterated.target(15).caveats[0]
    assert "the best of 4 samples of a prompt, a class or a batch is learned, and there are 3" in str(Raft().learns_nothing(3))
    assert Raft().learns_nothing(4) is None
    x = torch.linspace(-1, 1, 8)[:, None]
    with pytest.raises(InputError, match="the reward is 2 for all 8 samples"):
        next(iterate(Raft(), Flow(Affine()), Flow(BASE), lambda x: torch.full((len(x),), 2.0), x, stream(0), Rounds(CPU)))
    few = lambda x: torch.where(torch.arange(len(x)) < 5, torch.nan, slope(x))  # noqa: E731
    with pytest.raises(CollapseError, match="batch 1: none of 3 samples with finite rewards has a weight"):
        next(iterate(Raft(), Flow(Affine()), Flow(BASE), few, x, stream(0), Rounds(CPU), non_finite="drop"))
