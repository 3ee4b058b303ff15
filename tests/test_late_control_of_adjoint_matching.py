"""Adjoint Matching with a control from a time on: the fixed points of its rounds, what they cost, and what is refused."""

from __future__ import annotations

from typing import Any

import affine
import pytest
import torch
from affine import Affine, on_gaussian, riccati
from tiny import iterate
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.errors import InputError, SettingsError
from tiltflow.flows.field import FunctionField
from tiltflow.laws.gaussian_mixture import QuadraticReward
from tiltflow.methods.adjoint_matching import AdjointMatching, State
from tiltflow.samplers.chain import Chain
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

REWARD = QuadraticReward(torch.tensor([affine.LINEAR]), affine.QUADRATIC)


class Late(nn.Module):
    """The field of N(mean, variance) before step `late` of a chain, and the optimal control from there on, both moved by
    parameters."""

    def __init__(self, chain: Chain, late: int, mean: Tensor, variance: Tensor, control: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.chain, self.late, self.law = chain, late, (float(mean), float(variance))
        self.slope, self.shift = riccati(on_gaussian(chain)) if control is None else control
        self.early, self.after = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1)
        k = (t - self.chain.times).abs().argmin(1, keepdim=True)
        scale = torch.where(self.chain.control_scale > 0, self.chain.control_scale, 1.0)[k]
        controlled = affine.velocity(x, t) + (self.slope[k] * x + self.shift[k]) / scale
        own = affine.velocity(x, t, *self.law)
        early = t < self.chain.times[self.late] - 1e-9
        return torch.where(early, own + self.early[0] + self.early[1] * x, controlled + self.after[0] + self.after[1] * x)

    def affine(self) -> Affine:
        """The chain of this field."""
        base, early = on_gaussian(self.chain), on_gaussian(self.chain, *self.law)
        late = base.controlled(self.slope, self.shift)
        first = torch.arange(len(self.chain)) < self.late
        return Affine(torch.where(first, early.gain, late.gain), torch.where(first, early.offset, late.offset), base.std)


def rounds(chain: Chain, late: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """The laws of the ends after so many rounds, the base's first."""
    laws, control = [(torch.tensor(affine.MEAN), torch.tensor(affine.VARIANCE))], riccati(on_gaussian(chain))
    for _ in range(count):
        laws.append(Late(chain, late, *laws[-1], control).affine().law())
    return laws


@pytest.mark.parametrize(("time", "rate"), [(0.25, 1 / 64), (0.5, 1 / 8), (0.75, 9 / 16)])
def test_rounds_are_sweeps_of_a_gibbs_sampler(time: float, rate: float) -> None:
    """Means of successive rounds, in closed form at 200 steps: the rate t_c g / (1 + q w) up to O(h), the law the tilt."""
    chain = AdjointMatching(num_inference_steps=200, control_from=time).chain()
    laws = rounds(chain, round(200 * time), 30)
    moves = torch.stack([mean for mean, _ in laws]).diff()
    assert (moves[2] / moves[1]).item() == pytest.approx(rate, rel=0.05)
    assert laws[-1][0].item() == pytest.approx(affine.TILTED_MEAN, abs=1e-3)
    assert laws[-1][1].item() == pytest.approx(affine.TILTED_VARIANCE, rel=0.02)


def gradients(actor: Late, tuned: Late, batches: int = 25, size: int = 300, **settings: Any) -> tuple[Tensor, Tensor]:
    """z-scores of the gradient of the early and the late parameters of `tuned` on paths of `actor`."""
    method = AdjointMatching(num_inference_steps=len(actor.chain), **settings)
    found = []
    for seed in range(batches):
        tuned.zero_grad()
        fields = FunctionField(tuned), FunctionField(affine.velocity)
        x = torch.randn(size, 1, generator=stream(seed, "start"))
        list(iterate(method, *fields, REWARD, x, stream(seed, "noise"), State(), actor=FunctionField(actor)))
        found.append(torch.cat([tuned.early.grad, tuned.after.grad]))
    z = torch.stack(found).mean(0) / (torch.stack(found).std(0) / batches**0.5)
    return z[:2], z[2:]


@pytest.mark.parametrize(("time", "bootstrap"), [(0.25, 0.0), (0.5, 0.5)])
def test_a_round_ends_where_the_next_one_begins(time: float, bootstrap: float) -> None:
    """The gradient on paths of one round vanishes at the field of the next, early and late, and not at the one before it."""
    method = AdjointMatching(num_inference_steps=12, control_from=time)
    chain, late = method.chain(), round(12 * time)
    before, after = rounds(chain, late, 1)
    actor, tuned = Late(chain, late, *before), Late(chain, late, *after)
    settings = {"control_from": time, "bootstrap": bootstrap, "train_timesteps": [{"count": 4}]}
    early, control = gradients(actor, tuned, **settings)
    assert torch.cat([early, control]).abs().max() < 4
    early, control = gradients(actor, actor, **settings)
    assert early.abs().max() > 5
    assert control.abs().max() < 4


def test_early_steps_can_stay_with_the_base() -> None:
    """Their control is pulled to 0, with the weight that it has in the path KL."""
    method = AdjointMatching(num_inference_steps=12, control_from=0.5, early="base")
    chain = method.chain()
    of_base = torch.tensor(affine.MEAN), torch.tensor(affine.VARIANCE)
    tuned = Late(chain, 6, *of_base)
    _, control = gradients(tuned, tuned, control_from=0.5, early="base")
    assert control.abs().max() < 4
    assert torch.equal(tuned.early.grad, torch.zeros(2))
    tuned.early.data += torch.tensor([0.3, 0.0])
    tuned.zero_grad()
    fields = FunctionField(tuned), FunctionField(affine.velocity)
    (measured,) = iterate(method, *fields, REWARD, torch.randn(8, 1, generator=stream(0)), stream(1), State())
    weights = chain.control_scale[:6].square().sum()
    assert tuned.early.grad[0].item() == pytest.approx(2 * 0.3 * weights.item())
    assert measured["path_kl"] > 0.3**2 / 2 * weights.item()
    energy = method.priced_chain()[1]
    assert torch.equal(energy, torch.where(torch.arange(12) < 6, 0.0, chain.control_scale**2))


def test_the_law_of_early_steps_that_stay_with_the_base() -> None:
    """In closed form at many steps: N(0.65, 0.144531) for t_c = 1/2 (test_late_control.py); its target says it is no tilt."""
    chain = AdjointMatching(num_inference_steps=400).chain()
    tuned = Late(chain, 200, torch.tensor(affine.MEAN), torch.tensor(affine.VARIANCE))
    mean, variance = tuned.affine().law()
    assert (mean.item(), variance.item()) == pytest.approx((0.65, 0.144531), abs=1e-3)
    target = AdjointMatching(control_from=0.5, early="base", beta=0.5).target(1)
    assert (target.reaches, target.temperature, target.beta) == ("none", None, 0.5)
    assert target.words == "p_base(x) exp(r(x) / beta) given the state at t = 0.5, whose law is the base's"
    assert target.caveats[-1].startswith("Before t = 0.5 nothing is learned: what the base has settled by then")
    ordinary = AdjointMatching(control_from=0.5, beta=0.5).target(1)
    assert (ordinary.reaches, ordinary.temperature, ordinary.words) == ("exact", 0.5, "p_base(x) exp(r(x) / beta)")
    assert ordinary.caveats[-1].startswith("Between modes that are apart at t = 0.5 already, it takes many rounds")
    assert AdjointMatching().target(1).caveats == ()


def test_the_distillation_is_of_the_whole_early_part_and_as_large_as_its_steps() -> None:
    """Without noise in what is learned: all samples are 2, so the field is (2 - x) / (1 - t), and a field away from it by c has
    the gradient 2 c t_c per sample, whatever is drawn."""

    class Away(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.tensor(0.7))
            self.times: list[Tensor] = []

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t = t.reshape(-1, 1)
            if torch.is_grad_enabled():
                self.times.append(t.flatten())
            early = (t < 0.4).to(x)
            return (2 - x) / (1 - t) + early * self.c

    tuned = Away()
    method = AdjointMatching(num_inference_steps=10, control_from=0.4)
    fields = FunctionField(tuned), FunctionField(lambda x, t: (2 - x) / (1 - t))
    list(iterate(method, *fields, lambda x: 0 * x[:, 0], torch.zeros(5, 1), stream(1), State(), actor=fields[1]))
    assert tuned.c.grad.item() == pytest.approx(2 * 0.7 * 0.4)
    early = torch.cat(tuned.times)
    early = early[early < 0.4].sort().values
    parts = torch.arange(20) * 0.02  # four points for each of five samples
    assert ((early >= parts) & (early <= parts + 0.02)).all()


def test_no_adjoint_is_computed_before_the_control() -> None:
    """Twelve steps, the last of them without noise: seven evaluations of the base with gradient and five without."""
    with_gradient = []

    def base(x: Tensor, t: Tensor) -> Tensor:
        with_gradient.append(x.requires_grad)
        return affine.velocity(x, t)

    method = AdjointMatching(num_inference_steps=12, control_from=0.5)
    tuned = Late(method.chain(), 6, torch.tensor(0.6), torch.tensor(0.2))
    x = torch.randn(4, 1, generator=stream(0))
    list(iterate(method, FunctionField(tuned), FunctionField(base), REWARD, x, stream(1), State()))
    # the base at the first controlled step is needed for its control alone
    assert (sum(with_gradient), len(with_gradient)) == (5, 12)


@pytest.mark.parametrize("early", ["self-distillation", "base"])
def test_micro_batches_and_strata(early: str) -> None:
    """Micro-batches change nothing; a batch in which only early steps are drawn still has its gradient."""
    settings: dict[str, Any] = {"num_inference_steps": 12, "control_from": 0.5, "early": early}
    found = []
    for size in (None, 3):
        method = AdjointMatching(**settings, train_timesteps=[{"end": 0.4, "count": 2}, {"start": 0.4, "count": 2}])
        tuned = Late(method.chain(), 6, torch.tensor(0.6), torch.tensor(0.2))
        x = torch.randn(7, 1, generator=stream(0))
        fields = FunctionField(tuned), FunctionField(affine.velocity)
        (measured,) = iterate(method, *fields, REWARD, x, stream(1), State(), micro_batch_size=size)
        found.append((measured, tuned.early.grad, tuned.after.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    assert_close(found[0][1:], found[1][1:])
    assert found[0][1].abs().min() > 0


def test_samples_without_a_reward_leave_both_parts() -> None:
    method = AdjointMatching(num_inference_steps=8, control_from=0.5)

    def reward(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) == 1, torch.nan, REWARD(x))

    tuned = Late(method.chain(), 4, torch.tensor(0.6), torch.tensor(0.2))
    x, fields = torch.randn(6, 1, generator=stream(0)), (FunctionField(tuned), FunctionField(affine.velocity))
    (measured,) = iterate(method, *fields, reward, x, stream(1), State(), non_finite="drop")
    assert measured["dropped"] == 1
    assert tuned.early.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"control_from": 0.95}, r"control_from 0.95: the last step with noise, and control, is at t = 0.8"),
        ({"control_from": 0.5, "train_timesteps": [{"start": 0.5, "count": 2}]}, "train_timesteps: needs steps before"),
        ({"control_from": 0.5, "train_timesteps": [{"end": 0.5, "count": 2}]}, "train_timesteps: needs steps before"),
    ],
)
def test_a_control_of_nothing_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        AdjointMatching(num_inference_steps=10, **settings).target(1)


def test_what_does_not_go_with_a_late_control() -> None:
    with pytest.raises(SettingsError, match="drop_quantile is over all the steps"):
        AdjointMatching(control_from=0.5, drop_quantile=0.9)
    assert not AdjointMatching(control_from=0.1).needs.running_reward
    assert AdjointMatching().needs.running_reward
