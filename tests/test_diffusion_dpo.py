"""Diffusion-DPO: its gradient against autograd on the loss as it is written, where it settles, pairs of files, and mistakes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from perfect_fit import BASE, CPU, Shifted, slope
from PIL import Image
from scipy.optimize import brentq
from tiny import iterate
from torch import Tensor, nn

from tiltflow.data import Pairs, load_pairs
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.methods.diffusion_dpo import DiffusionDpo, State
from tiltflow.rewards.serving.votes import Votes
from tiltflow.streams import stream


def gradient_at(method: DiffusionDpo, mean: float, pairs: Pairs, count: int, seed: int = 0) -> tuple[float, dict[str, float]]:
    tuned, x = Shifted(mean), torch.zeros(count, 1)
    steps = iterate(method, Flow(tuned), Flow(BASE), slope, x, stream(seed), State(CPU, pairs=pairs))
    measured = next(steps)
    assert tuned.mean.grad is not None
    return tuned.mean.grad.item(), measured


def of_two_normals(count: int) -> tuple[Tensor, Tensor]:
    """Independent pairs of N(0, 1), the larger one first."""
    x = torch.randn(count, 2, generator=stream(5, "pairs")).sort(1, descending=True).values
    return x[:, :1], x[:, 1:]


COUNT = 40_000


def settles(method: DiffusionDpo, pairs: Pairs) -> float:
    """Where the gradient vanishes among shifts, with the same noise for all."""
    return float(brentq(lambda mean: gradient_at(method, mean, pairs, len(pairs))[0], 0.0, 3.0, xtol=5e-3))


def labelled(first: Tensor, second: Tensor, k: float) -> Pairs:
    """Each preferred with the probability sigmoid(k (a - b))."""
    chosen = torch.rand(first.shape, generator=stream(6)) < torch.sigmoid(k * (first - second))
    return Pairs(torch.where(chosen, first, second), torch.where(chosen, second, first))


def predicted(k: float, weight: Any, draws: int) -> float:
    """The same by quadrature: noise that a pair shares cancels in z, which for a shift s is s g (a - b), g the mean over draws
    of w 2 (1 - t)^2 / V^2, V = t^2 + (1 - t)^2, one t in each part; a - b has the variance 2."""
    nodes, chances = np.polynomial.hermite_e.hermegauss(60)
    gap = np.sqrt(2) * nodes
    t = (np.arange(draws) + np.random.default_rng(0).random((20_000, draws))) / draws
    g = (weight(t) * 2 * (1 - t) ** 2 / (t**2 + (1 - t) ** 2) ** 2).mean(1)[:, None]

    def slope(shift: float) -> float:
        z = shift * g * gap
        return float(((1 / (1 + np.exp(-z)) - 1 / (1 + np.exp(-k * gap))) * g * gap * chances).sum())

    return float(brentq(slope, 0, 5))


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0])
def test_where_the_published_loss_settles(k: float) -> None:
    """Uniform times, one draw, B = 2: not at the tilt by k x, N(k, 1), at any k / B."""
    method = DiffusionDpo(preset="paper", strength=4.0, data="unused")  # half of it multiplies the squares
    found = settles(method, labelled(*of_two_normals(COUNT), k))
    assert found == pytest.approx(predicted(k, np.ones_like, 1) / 2, rel=0.06)  # over seeds its deviation is .02


def test_labels_that_are_always_the_same_have_no_law() -> None:
    """The loss falls as far as the shift goes: noise that a pair shares hides no preference."""
    first, second = of_two_normals(4000)
    method = DiffusionDpo(labels="hard", data="unused", num_passes=1)
    assert all(gradient_at(method, shift, Pairs(first, second), 4000)[0] < 0 for shift in (0.5, 2.0, 4.0))


@pytest.mark.parametrize(("draws", "shift"), [(1, 0.757), (4, 0.990)])
def test_few_draws_are_a_weaker_tilt(draws: int, shift: float) -> None:
    """Choices by a reward x at beta = 1, whose tilt is N(1, 1)."""
    pairs = labelled(*of_two_normals(COUNT), 1.0)
    method = DiffusionDpo(labels="hard", data="unused", num_draws=draws, num_inference_steps=200)
    expected = predicted(1.0, lambda t: t / (1 - t), draws)
    assert expected == pytest.approx(shift, abs=5e-3)
    assert settles(method, pairs) == pytest.approx(expected, rel=0.06)


def test_soft_labels_of_own_samples_are_pairs_in_order() -> None:
    method = DiffusionDpo(beta=0.5)
    x, rewards = torch.arange(7.0)[:, None], torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 3.0, 9.0])
    found = method._among(x, rewards, [torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5, 6])])
    assert found.x[..., 0].tolist() == [[0, 2], [1, 4], [5, 6]]
    assert found.where.tolist() == [0, 1, 5]
    expected = torch.sigmoid(torch.tensor([-1.0, -5.0, -6.0], dtype=torch.float64) / 0.5)
    torch.testing.assert_close(found.preferred, expected)
    hard = DiffusionDpo(labels="hard")._among(x, torch.tensor([1.0, 0.0, 1.0, 5.0, 5.0, 3.0, 9.0]), [torch.arange(7)])
    assert hard.preferred.tolist() == [1, 0, 1]
    even = DiffusionDpo(labels="hard")._among(x[:2], torch.ones(2), [torch.arange(2)])
    assert even.preferred.tolist() == [0.5]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "settings", [{}, {"log_ratio": "uniform", "strength": 3.0}, {"labels": "hard", "beta": 2.0, "shift": 2.0}]
)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_gradient_is_that_of_the_loss_as_it_is_written(settings: dict[str, Any], micro_batch_size: int | None) -> None:
    """By autograd through the sigmoid of the mean over draws, with the same noise; in two dimensions."""
    method = DiffusionDpo(num_draws=3, num_inference_steps=5, num_passes=1, solver="euler", **settings)
    tuned = nn.Linear(3, 2).double()
    field = lambda x, t: tuned(torch.cat([x, t[:, None].to(x).expand(len(x), 1)], 1))  # noqa: E731
    base = lambda x, t: 0.3 * x  # noqa: E731
    x, generator = torch.randn(6, 2, generator=stream(0)), stream(1)
    rewards = lambda x: x[:, 0] - x[:, 1] ** 2  # noqa: E731
    steps = iterate(method, Flow(field), Flow(base), rewards, x, generator, State(CPU), micro_batch_size=micro_batch_size)
    measured = next(steps)
    found = [p.grad.clone() for p in tuned.parameters()]  # type: ignore[union-attr]
    tuned.zero_grad()

    again = stream(1)
    with torch.no_grad():
        end = x
        times = method.sampling.times().double()
        for s, t in pairwise(times):
            end = end + (t - s) * field(end, s.expand(6))
        compared = method._among(end, rewards(end), [torch.arange(6)])
        x0 = torch.randn(9, 2, generator=again, dtype=torch.float32).double().reshape(3, 3, 1, 2)
        t, weights = method._times(_batch(again), 3)
    at = t[..., None, None]
    points = (1 - at) * x0 + at * compared.x[:, None]
    u = compared.x[:, None] - x0
    flat, time = points.reshape(-1, 2), t[..., None].expand(3, 3, 2).reshape(-1)
    gaps = ((field(flat, time) - u.reshape(-1, 2)).square() - (base(flat, time) - u.reshape(-1, 2)).square()).sum(1)
    if method.log_ratio == "uniform":
        gaps = gaps / 2
    ratio = -(weights[..., None] * gaps.reshape(3, 3, 2)).mean(1)
    z = ratio[:, 0] - ratio[:, 1]
    p = compared.preferred
    loss = -(p * torch.sigmoid(z).log() + (1 - p) * torch.sigmoid(-z).log()).mean()
    loss.backward()
    for ours, parameter in zip(found, tuned.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-6, atol=1e-9)
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert measured["preference_accuracy"] in (0, 1 / 3, 2 / 3, 1)


class _batch:
    """What `_times` asks of a batch."""

    def __init__(self, generator: torch.Generator):
        self.generator, self.start = generator, 0.0


def test_times_and_weights_of_draws() -> None:
    """One in each part of the time, and means that are those over uniform times."""
    for shift in (1.0, 3.0):
        method = DiffusionDpo(num_draws=8, shift=shift, log_ratio="uniform", strength=2.0)
        t, weights = method._times(_batch(stream(0)), 500)  # type: ignore[arg-type]
        assert (t.flatten().sort().values.diff() > 0).all()
        assert weights.mean().item() == pytest.approx(1, abs=1e-9)
        assert (weights * t).mean().item() == pytest.approx(0.5, abs=1e-3)
        assert (weights * t**2).mean().item() == pytest.approx(1 / 3, abs=1e-3)
        spread = t.sort(1).values
        assert (spread.diff(dim=1) > 0).all()
    t, weights = DiffusionDpo(num_inference_steps=4)._times(_batch(stream(0)), 100)  # type: ignore[arg-type]
    assert ((weights == 0) == (t > 0.75)).all()
    inside = t <= 0.75
    torch.testing.assert_close(weights[inside], (t / (1 - t))[inside])


def test_the_likelihood_ratio_of_two_gaussians() -> None:
    """log N(x; m, 1) / N(x; 0, 1) = m x - m^2 / 2: the difference over a pair is m (a - b), and z its mean over many draws."""
    first, second = torch.full((400, 1), 1.3), torch.full((400, 1), -0.4)
    method = DiffusionDpo(labels="hard", data="unused", num_draws=64, num_inference_steps=400)
    _, measured = gradient_at(method, 0.5, Pairs(first, second), 400)
    exact = float(torch.nn.functional.softplus(torch.tensor(-0.5 * 1.7)))
    assert measured["loss"] == pytest.approx(exact, abs=0.03)
    assert measured["preference_accuracy"] > 0.9


def test_pairs_of_a_file(tmp_path: Path) -> None:
    winners, losers = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    np.savez(tmp_path / "pairs.npz", winners=winners, losers=losers, prompts=np.array(["a", "b", "a", "c", "c"]))
    pairs = load_pairs(tmp_path / "pairs.npz")
    assert (len(pairs), pairs.of_prompt("a"), pairs.of_prompt("z")) == (5, [0, 2], [])
    assert torch.equal(pairs.losers, torch.from_numpy(losers))
    method = DiffusionDpo(data=str(tmp_path / "pairs.npz"), labels="hard")
    assert method.new_state((3,), 0, CPU).pairs.prompts == pairs.prompts  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"pairs of shape \[3\], but samples of \[4\]"):
        method.new_state((4,), 0, CPU)

    class Asked:
        texts, generator, x = ["c", "a", "c"], stream(0), torch.zeros(3, 3)

        def __len__(self) -> int:
            return 3

    found = method._of_file(Asked(), pairs)  # type: ignore[arg-type]
    rows = [int((pairs.winners == x[0]).all(1).nonzero()) for x in found.x]
    assert [pairs.prompts[row] for row in rows] == ["c", "a", "c"]  # type: ignore[index]
    assert all(torch.equal(x[1], pairs.losers[row]) for x, row in zip(found.x, rows, strict=True))
    Asked.texts = ["bb"] * 3
    with pytest.raises(InputError, match="has no pair of the prompt 'bb'"):
        method._of_file(Asked(), pairs)  # type: ignore[arg-type]


def test_pairs_of_a_folder_of_pictures(tmp_path: Path) -> None:
    for side, level in (("winners", 255), ("losers", 0)):
        (tmp_path / side).mkdir()
        for name in ("1.png", "2.png"):
            Image.fromarray(np.full((4, 4), level, np.uint8)).save(tmp_path / side / name)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    pairs = load_pairs(tmp_path)
    assert (pairs.winners.shape, pairs.prompts) == ((2, 1, 4, 4), ["a cat", "a dog"])
    assert (pairs.winners == 1).all()
    assert (pairs.losers == -1).all()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(InputError, match="has 1 prompts for 2 pairs"):
        load_pairs(tmp_path)
    (tmp_path / "losers" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png is in one of the folders winners and losers alone"):
        load_pairs(tmp_path)


def test_pairs_that_people_voted_on(tmp_path: Path) -> None:
    """Who was chosen wins, on whichever side it was; a tie is no pair."""
    levels = torch.linspace(-1, 0.8, 4)[:, None, None, None].expand(-1, 1, 4, 4)
    names, prompts = ("after", "before"), ["a cat", "a dog", "a cat", "a cow"]
    votes = Votes.create(tmp_path / "votes", names, prompts, [{}] * 4, [levels, levels + 0.2], 0)
    with pytest.raises(InputError, match="nobody has chosen"):
        DiffusionDpo(labels="hard", data=str(tmp_path / "votes")).new_state((1, 4, 4), 0, torch.device("cpu"))
    votes.vote("second")
    votes.vote("tie")
    votes.vote("first")
    pairs = DiffusionDpo(labels="hard", data=str(tmp_path / "votes")).new_state((1, 4, 4), 0, torch.device("cpu")).pairs
    assert pairs is not None
    assert pairs.prompts == ["a cat", "a cat"]
    expected = [levels[0, 0, 0, 0] + 0.2, levels[2, 0, 0, 0]], [levels[0, 0, 0, 0], levels[2, 0, 0, 0] + 0.2]
    for side, values in zip((pairs.winners, pairs.losers), expected, strict=True):
        assert torch.allclose(side[:, 0, 0, 0], torch.stack(values), atol=0.01)


def test_words_and_refusals(tmp_path: Path) -> None:
    soft = DiffusionDpo(beta=0.5).target(1)
    assert (soft.reaches, soft.temperature, len(soft.caveats)) == ("exact", 0.5, 1)
    assert "The mean of 16 draws" in soft.caveats[0]
    for method, said in (
        (DiffusionDpo(preset="paper"), "temperature depends on the time"),
        (DiffusionDpo(labels="hard"), "the loss falls without end"),
        (DiffusionDpo(labels="hard", data="x"), "the choices of the data"),
    ):
        assert method.target(1).reaches == "none"
        assert any(said in caveat for caveat in method.target(1).caveats)
    published = DiffusionDpo(preset="paper")
    assert (published.labels, published.num_draws, published.strength) == ("hard", 1, 2000)
    assert published.optimizer_defaults["learning_rate"] == 2.048e-8
    assert (DiffusionDpo().learns_nothing(2), DiffusionDpo(labels="hard", data="x").learns_nothing(1)) == (None, None)
    assert "a single one has no other" in str(DiffusionDpo().learns_nothing(1))
    with pytest.raises(InputError, match="data have winners and no rewards"):
        DiffusionDpo(data="pairs.npz")
    with pytest.raises(InputError, match="no such pairs"):
        load_pairs(tmp_path / "none.npz")
    np.savez(tmp_path / "half.npz", winners=np.zeros((2, 3)))
    with pytest.raises(InputError, match="holds winners, but no losers"):
        load_pairs(tmp_path / "half.npz")
    np.savez(tmp_path / "uneven.npz", winners=np.zeros((2, 3)), losers=np.zeros((3, 3)))
    with pytest.raises(InputError, match=r"as many winners as losers of one shape, got \[2, 3\] and \[3, 3\]"):
        load_pairs(tmp_path / "uneven.npz")
    with pytest.raises(InputError, match="no condition of the batch has two samples"):
        DiffusionDpo()._among(torch.zeros(2, 1), torch.zeros(2), [torch.tensor([0]), torch.tensor([1])])
