"""Rewards learned from votes: the fit against its optimality and planted weights, what it says of itself against the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_classifier
from torch import Tensor

from tiltflow.errors import InputError, Note
from tiltflow.rewards.functions.bradley_terry import fit, held_out, left_out, loss, share_interval, spanned, strength
from tiltflow.rewards.preference import Preference, learn
from tiltflow.rewards.serving.votes import Votes
from tiltflow.streams import stream

PLANTED = torch.tensor([1.2, -0.7, 0.3, 0.0], dtype=torch.float64)


def planted(count: int, weights: Tensor = PLANTED, name: str = "votes") -> tuple[Tensor, Tensor]:
    """Differences, and votes by the model itself."""
    generator = stream(0, name)
    d = torch.randn(count, len(weights), generator=generator, dtype=torch.float64)
    return d, torch.bernoulli((d @ weights).sigmoid(), generator=generator)


def test_the_fit_is_the_optimum_and_recovers_planted_weights() -> None:
    d, y = planted(4000)
    w = fit(d, y, 1e-6)
    p = (d @ w).sigmoid()
    assert (d.T @ (p - y) + 1e-6 * w).abs().max() < 1e-6
    information = (d * (p * (1 - p))[:, None]).T @ d
    z = (w - PLANTED) / torch.linalg.inv(information).diagonal().sqrt()
    assert z.abs().max() < 4
    # one vote in one dimension: w solves sigmoid(-w) = l2 w
    alone = fit(torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0.5).item()
    assert torch.tensor(-alone).sigmoid().item() == pytest.approx(0.5 * alone, rel=1e-6)
    # half a vote for either is what a vote for each is
    tie, both = (fit(*each, 0.3) for each in ((d[:1] * 2**0.5, torch.tensor([0.5]).double()), (d[:1].repeat(2, 1), y[:2])))
    assert tie.abs().max() < 1e-12
    assert fit(d[:1].repeat(2, 1), torch.tensor([0.0, 1.0]).double(), 0.3).abs().max() < 1e-12
    assert both.shape == tie.shape
    separable = fit(d[:30], (d[:30, 0] > 0).double(), 1e-3)  # far from 0, where whole steps of Newton's method overshoot
    assert loss(d[:30], (d[:30, 0] > 0).double(), 1e-3, separable) < loss(
        d[:30], (d[:30, 0] > 0).double(), 1e-3, separable * 1.01
    )


def test_probabilities_are_calibrated() -> None:
    """By the votes of other pairs, in each fifth of the probabilities."""
    w = fit(*planted(2000), 1.0)
    d, y = planted(20_000, name="others")
    p = (d @ w).sigmoid()
    for part in p.argsort().chunk(5):
        error = (p[part] * (1 - p[part])).mean().sqrt() / len(part) ** 0.5
        assert abs(p[part].mean() - y[part].mean()) < 4 * error + 0.01  # 0.01: w itself has an error


def without(values: Tensor, i: int) -> Tensor:
    return torch.cat([values[:i], values[i + 1 :]])


def test_a_vote_left_out_is_one_step_of_newtons_method_towards_the_refit() -> None:
    """The step, taken for each vote by itself; and the more votes there are, the less is missing after it."""
    missing = []
    for count in (50, 400):
        d, y = planted(count)
        w, found = fit(d, y, 0.5), left_out(d, y, 0.5)
        steps, refits = [], []
        for i in range(50):
            some, others = without(d, i), without(y, i)
            p = (some @ w).sigmoid()
            hessian = (some * (p * (1 - p))[:, None]).T @ some + 0.5 * torch.eye(4, dtype=torch.float64)
            steps.append(d[i] @ (w - torch.linalg.solve(hessian, some.T @ (p - others) + 0.5 * w)))
            refits.append(d[i] @ fit(some, others, 0.5))
        assert torch.allclose(found[:50], torch.stack(steps), atol=1e-8)
        exact = torch.stack(refits)
        missing.append(((found[:50] - exact).norm() / ((d @ w)[:50] - exact).norm()).item())
    assert missing[1] < missing[0] / 4  # of order 1 / votes: an eighth


def test_the_penalty_follows_what_there_is_to_learn() -> None:
    d, y = planted(300)
    noise = torch.bernoulli(torch.full_like(y, 0.5), generator=stream(0, "chance"))
    assert strength(d, y) < strength(d, noise)


def test_the_fit_in_the_span_is_the_fit() -> None:
    d, y = planted(12, torch.linspace(-1, 1, 40, dtype=torch.float64))  # more features than votes
    some, basis = spanned(d)
    assert some.shape[1] == 12
    assert torch.allclose(basis @ fit(some, y, 0.7), fit(d, y, 0.7), atol=1e-8)


def test_held_out_accuracy_is_that_of_new_votes() -> None:
    """And of votes by chance it is a half, however many features there are to fit them by."""
    d, y = planted(600)
    w = fit(d, y, 1.0)
    new, others = planted(20_000, name="others")
    truth = ((new @ w > 0) == (others > 0.5)).double().mean().item()
    found = ((held_out(d, y, stream(0, "parts")) > 0) == (y > 0.5)).double().sum().item()
    low, high = share_interval(found, 600)
    assert low < truth < high
    wide = torch.randn(100, 80, generator=stream(1, "wide"), dtype=torch.float64)
    chance = torch.bernoulli(torch.full((100,), 0.5), generator=stream(2, "wide")).double()
    right = ((held_out(wide, chance, stream(0, "parts")) > 0) == (chance > 0.5)).double().sum().item()
    low, high = share_interval(right, 100)
    assert low < 0.5 < high


def test_the_interval_is_wilsons() -> None:
    """Its edges are where a z-test just accepts."""
    for right, count in ((3, 20), (0, 9), (45, 50)):
        for edge in share_interval(right, count):
            share = right / count
            if 0 < edge < 1:
                assert abs(share - edge) == pytest.approx(1.96 * (edge * (1 - edge) / count) ** 0.5, rel=1e-6)


# ---- from a folder ----


def folder_of_votes(path: Path, count: int, ties: int = 0) -> Votes:
    """Pairs of pictures of which the brighter one is chosen, mostly."""
    generator = stream(0, "pictures")
    both = [torch.rand(count, 1, 1, 1, generator=generator) * 2 - 1 for _ in range(2)]
    pictures = [each.expand(-1, 1, 8, 8) for each in both]
    votes = Votes.create(path, ("after", "before"), [""] * count, [{}] * count, pictures, 0)
    for i in range(count):
        votes.vote("tie" if i < ties else "first" if (both[0][i] > both[1][i]).item() != (i % 10 == 9) else "second")
    return votes


def test_a_reward_from_a_folder_of_votes(tmp_path: Path) -> None:
    folder_of_votes(tmp_path / "votes", 60, ties=4)
    settings: Any = {"votes": str(tmp_path / "votes"), "classifier": str(tiny_classifier(tmp_path / "classifier"))}
    with pytest.warns(Note, match=r"60 votes, 4 of them ties; of held-out votes it predicts \d+% \(\d+% to \d+%\)$"):
        reward = Preference(**settings).build()
    levels = torch.tensor([-0.9, 0.0, 0.9])[:, None, None, None].expand(-1, 1, 8, 8).clone().requires_grad_()
    values = reward(levels)
    assert values[0] < values[1] < values[2]
    (gradient,) = torch.autograd.grad(values.sum(), levels)
    assert gradient.abs().sum() > 0
    # differences of the reward are the log-odds of the fit
    votes = Votes.open(tmp_path / "votes")
    with pytest.warns(Note):
        again = Preference(**settings, l2=0.7).build()
    first, second = (again(votes.pictures(side)).double() for side in range(2))
    p, y = (first - second).sigmoid(), votes.outcomes()
    assert abs((p - y).sum()) < 12  # no more than the penalty leaves


def test_too_few_votes_are_refused_and_votes_by_chance_are_told(tmp_path: Path) -> None:
    few = folder_of_votes(tmp_path / "few", 12, ties=3)
    with pytest.raises(InputError, match="9 votes for one of two pictures; at least 10 are needed"):
        learn(few, lambda x: x.flatten(1))
    blank = Votes.create(tmp_path / "blank", ("a", "b"), [""] * 20, [{}] * 20, [torch.zeros(20, 1, 8, 8)] * 2, 0)
    for i in range(20):
        blank.vote("first" if i % 2 else "second")
    assert "which chance explains" in learn(blank, lambda x: x.flatten(1)).words
    with pytest.raises(InputError, match="has no votes; `tiltflow vote RUN"):
        Preference(votes=str(tmp_path), classifier="digits-classifier").build()
    with pytest.raises(ValueError, match="give either classifier or clip"):
        Preference(votes="votes")
