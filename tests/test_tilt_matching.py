"""Tilt matching and its family against closed forms: the fixed points of their own gradients among affine fields."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from perfect_fit import BASE, BINS, COUNT, CPU, Affine, Shifted, after, bowl, first_gradient, fitted_round, slope
from tiny import iterate
from torch import Tensor, nn

from tiltflow.errors import CollapseError, InputError
from tiltflow.flows.flow import Flow
from tiltflow.laws.exponential_family import Pooled
from tiltflow.laws.gaussian_mixture import ExactVelocity, mixture
from tiltflow.methods.diffusion_nft import DiffusionNft
from tiltflow.methods.ram import Ram
from tiltflow.methods.tilt_matching import State, TiltMatching
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.replay import Kept, Replay

EXACT: dict[str, dict[str, Any]] = {
    "default": {},
    "default without neighbours": {"neighbours": 1},
    "anchor old": {"anchor": "old"},
    "anchor none": {"anchor": "none"},
    "least relative noise": {"anchor_share": "least-relative-noise"},
    "implicit": {"preset": "implicit"},
    "reward-weighting": {"preset": "reward-weighting"},
    "memoryless": {"solver": "memoryless", "num_inference_steps": 100},
}


@pytest.mark.parametrize(
    "name", ["default", "default without neighbours", "least relative noise", "implicit", "reward-weighting"]
)
def test_one_round_is_exact_on_a_bowl(name: str) -> None:
    """N(0, 1) exp(-x^2 / 2) is N(0, 1/2)."""
    mean, variance = after(TiltMatching(target_effective_sample_size=0, **EXACT[name]), bowl, 1)
    assert mean == pytest.approx(0, abs=0.015)
    assert variance == pytest.approx(0.5, abs=0.015)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("anchor old", "anchor none", "least relative noise")]


@pytest.mark.parametrize("name", ["default", *SLOWER, "implicit", "reward-weighting", "memoryless"])
def test_rounds_are_exact_whatever_they_learn_from(name: str) -> None:
    """At beta = 1/2 the law is N(0, 1/3). A share of .9 takes the inverse temperature there in several rounds; one more at it
    changes nothing."""
    method = TiltMatching(beta=0.5, target_effective_sample_size=0.9, **EXACT[name])
    tuned, state, tilts = Affine(), method.new_state((1,), 0, CPU), []
    for i in range(4):
        measured = fitted_round(method, tuned, bowl, state, i)
        tilts.append(state.tilt)
        assert measured["inverse_temperature"] == state.tilt
        assert tuned.law[1] == pytest.approx(1 / (1 + state.tilt), abs=0.02)
    assert tilts[0] == pytest.approx(0.7727, abs=0.005)  # sqrt(1 + 2 h) / (1 + h) = .9
    assert tilts == sorted(tilts)
    assert tilts[-2:] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("preset", "rounds"),
    [(None, 2), ("implicit", 2), ("reverse", 2), ("reward-weighting", 1), ("explicit", 2)],
)
def test_a_linear_reward_is_tilted_exactly(preset: Any, rounds: int) -> None:
    """N(0, 1) exp(x / 2) is N(1/2, 1)."""
    mean, variance = after(TiltMatching(preset=preset, beta=2.0, target_effective_sample_size=0, neighbours=64), slope, rounds)
    assert mean == pytest.approx(0.5, abs=0.015)
    assert variance == pytest.approx(1, abs=0.03)  # over seeds its deviation is .009, that of the mean .004


def test_one_explicit_round_overshoots_a_bowl() -> None:
    """S -> S exp(-h S): exp(-1)."""
    method = TiltMatching(preset="explicit", target_effective_sample_size=0)
    assert after(method, bowl, 1)[1] == pytest.approx(0.367879, abs=0.01)


def test_explicit_rounds_compose() -> None:
    """Two rounds of 1/2: exp(-1/2), and of that exp(-exp(-1/2) / 2), which is .447864."""
    tuned, state = Affine(), State(CPU)
    method = TiltMatching(preset="explicit", target_effective_sample_size=0)
    for i, beta in enumerate((2.0, 1.0)):
        fitted_round(method.model_copy(update={"beta": beta}), tuned, bowl, state, i)
    assert tuned.law[1] == pytest.approx(0.447864, abs=0.01)


@pytest.mark.parametrize("relative", [False, True])
def test_the_share_of_the_anchors_term_leaves_the_least_noise(relative: bool) -> None:
    """Of samples of the base and of a tilt, toward a stronger one; and all of it where the next law is the anchor's."""
    method = TiltMatching(anchor_share="least-relative-noise" if relative else "least-noise")
    rewards = torch.randn(400, generator=stream(0, "rewards"), dtype=torch.float64)
    family = Pooled.of(rewards, torch.tensor([0.0, 0.5]).repeat_interleave(200))
    weights, of_anchor = family.weights(1.2), family.weights(0.0)

    def noise(share: float) -> float:
        left = (weights - share * of_anchor).square()
        return float((left / weights if relative else left).mean())

    share = method._share(weights, of_anchor)
    assert 0.05 < share < 0.95
    assert all(noise(share) < noise(share + away) for away in (-0.01, 0.01))
    assert method._share(of_anchor, of_anchor) == pytest.approx(1, abs=1e-12)


def test_samples_that_both_laws_leave_out_have_no_share() -> None:
    method = TiltMatching(anchor_share="least-relative-noise")
    weights = torch.tensor([0.0, 1.5, 1.5], dtype=torch.float64)
    assert method._share(weights, weights) == pytest.approx(1)
    assert method._share(weights, torch.ones(3, dtype=torch.float64)) == 0  # no share keeps that noise finite


def test_the_reverse_form_corrects_what_the_model_got_wrong() -> None:
    """At the inverse temperature that is asked for, from a law that is not there yet: N(.2, 1) where N(.5, 1) is right. Around
    the last round nothing moves; around the base the next round is nearer, and the samples of the base help further."""

    def wrong() -> Affine:
        tuned = Affine()
        part = (torch.arange(4000) + 0.5) / 4000
        v = part**2 + (1 - part) ** 2  # the field of N(m, 1) has m (1 - t) / v more than that of N(0, 1)
        tuned.offset.data = 0.2 * ((1 - part) / v).reshape(BINS, -1).mean(1)
        return tuned

    def after_one(preset: Any, rise: float) -> float:
        tuned, state = wrong(), State(CPU, tilt=0.5, aim=0.5, batches=1)
        assert tuned.law[0] == pytest.approx(0.2, abs=1e-3)
        method = TiltMatching(preset=preset, beta=1 / (0.5 + rise), target_effective_sample_size=0)
        fitted_round(method, tuned, slope, state)
        return tuned.law[0]

    assert after_one("implicit", 0.0) == pytest.approx(0.2, abs=1e-3)
    t = np.linspace(0, 1, 2001)
    v = t**2 + (1 - t) ** 2
    for rise in (0.0, 0.5):
        # The samples reweighted to the base are at -.3. The share of that error that is taken off, s = E_q[W A] / E_q[A^2], is
        # exp(-rise / 2) / exp(1/4). With M = .2 + rise, the affine v with E[W (u - v)] = s E[A (u - v_base)], times 1 and times
        # x_t, is the field of N(M, 1), and `error` and b (x - t M) more; the mean of its law follows from its ODE.
        error = 0.3 * math.exp(-rise / 2 - 0.25) * (1 - t) / v
        b = -error * t * (0.5 + rise) / v
        left = np.array([np.trapezoid(b[i:], t[i:]) for i in range(len(t))])
        mean = 0.2 + rise + np.trapezoid(error * np.exp(left) / np.sqrt(v), t)
        assert after_one("reverse", rise) == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize(
    ("method", "share"),
    [
        (TiltMatching(target_effective_sample_size=0), 1.0),
        (TiltMatching(target_effective_sample_size=0, regression_batch_size=30_000), 1.0),
        (Ram(), (1 + math.erf(0.9 * 0.5**0.5)) / 2),
    ],
)
@pytest.mark.parametrize("dimension", [1, 2])
def test_the_gradient_is_that_of_the_samples_as_they_were_drawn(method: Any, share: float, dimension: int) -> None:
    """Though those that count more are seen more often. From N(0, 1) to N(1, 1) the field rises by (1 - t) / V, with
    V = t^2 + (1 - t)^2: pi / 4 over all times, of which the gradient of the square has twice the negative. Linear advantages
    that are clipped at -.9 have the share P(x > -.9) of it, by Stein's lemma. A mean over two dimensions has half."""
    base = Flow(ExactVelocity(mixture(torch.zeros(1, dimension, dtype=torch.float64), (1.0,), 1.0)))
    offset = nn.Parameter(torch.zeros(()))
    levels, generator = (torch.arange(COUNT) + 0.5).double() / COUNT, stream(0, "order")
    x = torch.stack(
        [torch.special.ndtri(levels).float()[torch.randperm(COUNT, generator=generator)] for _ in range(dimension)], 1
    )
    tuned, state = Flow(lambda x, t: base(x, t) + offset), method.new_state((dimension,), 0, CPU)
    next(iterate(method, tuned, base, slope, x, stream(0), state, parameters=(offset,)))
    assert offset.grad is not None
    assert offset.grad.item() == pytest.approx(-share * math.pi / 2 / dimension, abs=0.03)


# ---- what is exactly zero ----


@pytest.mark.parametrize("preset", [None, "implicit", "reverse", "explicit", "reward-weighting"])
def test_a_constant_reward_teaches_nothing_sample_by_sample(preset: Any) -> None:
    """But by reward weighting, which learns its own samples again."""
    method = TiltMatching(preset=preset, num_inference_steps=5)
    zero = bool((first_gradient(method, lambda x: torch.full((len(x),), 0.3)) == 0).all())
    assert zero == (preset != "reward-weighting")
    assert not (first_gradient(method, slope) == 0).all()


def test_around_the_last_round_a_model_that_is_no_exact_field_is_left_alone() -> None:
    method = TiltMatching(preset="implicit", num_inference_steps=5)
    assert (first_gradient(method, lambda x: torch.zeros(len(x)), anchor=0.3) == 0).all()


@pytest.mark.parametrize("preset", [None, "implicit", "reverse", "reward-weighting", "explicit"])
def test_the_offset_of_the_reward_does_not_matter(preset: Any) -> None:
    method = TiltMatching(preset=preset, num_inference_steps=5)
    one, other = (first_gradient(method, lambda x, c=c: x[:, 0].double() + c) for c in (0.0, 1000.0))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- noise ----


def noise_of(method: TiltMatching, tilt: float, aim: float, draws: int = 40) -> float:
    """The variance of the gradient at the optimum of a round of a linear reward, from N(tilt, 1) to N(aim, 1)."""
    found = []
    for i in range(draws):
        tuned = Shifted(tilt)
        state = State(CPU, tilt=tilt, batches=1)
        x = torch.randn(512, 1, generator=stream(i, "x"))
        method = method.model_copy(update={"beta": 1 / aim, "num_passes": 2})
        steps = iterate(method, Flow(tuned), Flow(BASE), slope, x, stream(i), state, parameters=(tuned.mean,))
        next(steps)
        tuned.mean.data.fill_(aim)
        tuned.mean.grad = None
        next(steps)
        found.append(tuned.mean.grad.item())  # type: ignore[attr-defined]
    return float(np.var(found))


def test_implicit_matching_has_far_less_noise_than_reward_weighting() -> None:
    """The second of four rounds to a tilt of 1: its signal is a quarter, that of reward weighting's noise is whole."""
    settings: dict[str, Any] = {"target_effective_sample_size": 0, "num_inference_steps": 5}
    noises = {
        preset: noise_of(TiltMatching(preset=preset, **settings), 0.25, 0.5) for preset in ("implicit", "reward-weighting")
    }
    assert noises["reward-weighting"] > 10 * noises["implicit"]


# ---- rounds ----


def test_the_inverse_temperature_follows_a_beta_that_changes() -> None:
    tuned, state = Affine(), State(CPU)
    for i, (beta, variance) in enumerate(((1.0, 0.5), (0.5, 1 / 3), (2.0, 2 / 3))):
        method = TiltMatching(beta=beta, target_effective_sample_size=0.3)
        measured = fitted_round(method, tuned, bowl, state, i)
        assert state.tilt == pytest.approx(1 / beta, abs=1e-12)
        # begun at a variance S that is off by .004, the tilt is off by .004 / S^2, S = 1 / 3 before the last round
        assert measured["tilt_step"] == pytest.approx((1.0, 1.0, -1.5)[i], abs=0.1)
        assert tuned.law[1] == pytest.approx(variance, abs=0.02)
        # KL(N(0, s) | N(0, 1))
        assert measured["kl"] == pytest.approx((variance - 1 - math.log(variance)) / 2, abs=0.01)


def test_a_round_that_did_not_fit_is_told_by_its_mean_reward() -> None:
    """Half of the way to N(1/2, 1): the next round begins at a tilt of 1/4, as far as 20,000 samples of each say."""
    tuned, state = Affine(), State(CPU)
    method = TiltMatching(beta=2.0, target_effective_sample_size=0)
    fitted_round(method, tuned, slope, state)
    tuned.offset.data /= 2
    tuned.slope.data /= 2
    measured = fitted_round(method, tuned, slope, state, 1)
    assert measured["inverse_temperature"] == 0.5
    assert measured["tilt_step"] == pytest.approx(0.25, abs=0.02)
    assert state.replay.batches[-1].tilt == pytest.approx(0.25, abs=0.02)
    assert tuned.law[0] == pytest.approx(0.5, abs=0.02)


def test_a_sample_that_went_astray_does_not_decide_where_a_round_begins() -> None:
    def astray(x: Tensor) -> Tensor:
        rewards = slope(x)
        rewards[0] = -1e6
        return rewards

    tuned, state = Affine(), State(CPU)
    method = TiltMatching(beta=2.0, target_effective_sample_size=0)
    fitted_round(method, tuned, slope, state)
    fitted_round(method, tuned, astray, state, 1)
    assert state.replay.batches[-1].tilt == pytest.approx(0.5, abs=0.02)


def test_earlier_rewards_that_are_all_equal_do_not_say_where_a_round_begins() -> None:
    """Every tilt has their mean."""
    earlier = Kept(torch.zeros(8, 1), torch.full((8,), 0.1).double(), torch.zeros(8, dtype=torch.long), [""], 0.0)
    state = State(CPU, tilt=0.5, aim=0.5, batches=1, replay=Replay([earlier]))
    measured = fitted_round(TiltMatching(beta=2.0, num_inference_steps=2), Affine(), slope, state)
    assert measured["inverse_temperature"] == state.replay.batches[-1].tilt == 0.5


def test_what_a_round_measures() -> None:
    """exp(h x) of N(0, 1): the share exp(-h^2) is .7 at h = sqrt(-log .7)."""
    state = State(CPU)
    method = TiltMatching(beta=0.5, num_passes=1, preset="implicit")
    x = torch.randn(50_000, 1, generator=stream(3, "x"))
    tuned = Affine()
    batch = Batch(x, Flow(tuned), Flow(BASE), slope, stream(0), parameters=tuple(tuned.parameters()))
    (measured,) = method.gradients(batch, state)
    assert (
        measured["tilt_step"]
        == measured["inverse_temperature"]
        == state.tilt
        == pytest.approx((-math.log(0.7)) ** 0.5, rel=0.02)
    )
    assert measured["effective_sample_size"] / 50_000 == pytest.approx(0.7, abs=1e-3)
    assert measured["largest_weight"] == pytest.approx(float(torch.exp(state.tilt * x.max() - state.tilt**2 / 2)), rel=0.05)
    assert measured["reward"] == pytest.approx(0, abs=0.02)
    assert measured["reward_std"] == pytest.approx(1, abs=0.02)
    assert "kl" not in measured  # of the law at 1 / beta, once that is what a round aims at


@pytest.mark.parametrize("beta", [2.0, 0.5])
def test_samples_of_the_base_are_drawn_while_they_carry_the_weights(beta: float) -> None:
    """exp(h x) of N(0, 1): the share exp(-h^2) is .78 at 1 / 2, more than .7, and .02 at 2. The tilted law is N(h, 1)."""
    x = torch.special.ndtri((torch.arange(COUNT) + 0.5).double() / COUNT).float()[:, None]
    for proposal in ("auto", "tuned"):
        method = TiltMatching(beta=beta, num_passes=1, proposal=proposal)
        tuned, state = Affine(), State(CPU)
        batch = Batch(x, Flow(tuned), Flow(BASE), slope, stream(0), parameters=tuple(tuned.parameters()))
        list(method.gradients(batch, state))
        tuned.offset.data += 1.0
        again = State(CPU)
        again.load_state_dict(state.state_dict())
        (measured,) = method.gradients(batch, again)
        drawn, base = again.replay.batches[-1], proposal == "auto" and beta == 2
        assert state.from_base is again.from_base is base
        assert (drawn.tilt == 0) is base
        assert torch.allclose(drawn.x, x, atol=0.02) is base
        if base:  # what is reported is the law that is learned
            assert (measured["reward"], measured["reward_std"]) == (pytest.approx(0.5, abs=0.01), pytest.approx(1, abs=0.01))
            assert measured["inverse_temperature"] == 0.5
            assert measured["tilt_step"] == 0


def test_samples_of_the_base_forget_what_earlier_rounds_got_wrong() -> None:
    """N(0, 1) exp(x / 2) is N(1/2, 1), after a round that begins at N(1, 1) and takes itself to be there."""
    tuned, state = Affine(), State(CPU, tilt=0.5, aim=0.5, from_base=True, batches=1)
    tuned.offset.data += 1.0
    fitted_round(TiltMatching(beta=2.0, proposal="auto", neighbours=64), tuned, slope, state)
    assert tuned.law == (pytest.approx(0.5, abs=0.015), pytest.approx(1, abs=0.03))


def test_a_state_of_an_earlier_version_is_read() -> None:
    old = State(CPU, from_base=True).state_dict()
    del old["from_base"]
    again = State(CPU)
    again.load_state_dict(old)
    assert not again.from_base


def test_a_round_of_several_batches_is_drawn_from_the_weights_at_its_start() -> None:
    method = TiltMatching(batches_per_round=3, num_passes=1, num_inference_steps=5, beta=0.2, replay=1)
    tuned, state, tilts, rewards = Affine(), State(CPU), [], []
    for i in range(6):
        x = torch.linspace(-2, 2, 64)[:, None]
        batch = Batch(x, Flow(tuned), Flow(BASE), slope, stream(i), parameters=(tuned.offset, tuned.slope))
        (measured,) = method.gradients(batch, state)
        tuned.offset.data += 0.1
        tilts.append(measured["inverse_temperature"])
        rewards.append(measured["reward"])
        assert state.tilt == (tilts[0] if i in (2, 3, 4) else tilts[3] if i == 5 else 0.0)
        assert state.batches == i + 1
    assert tilts[0] == tilts[1] == tilts[2] < tilts[3] == tilts[4] == tilts[5]
    assert rewards[:3] == [pytest.approx(0, abs=1e-6)] * 3
    assert rewards[3] == rewards[4] == rewards[5] > 0.1


def test_weights_are_copied_for_what_needs_them_alone() -> None:
    for settings, copied in (({}, 0), ({"anchor": "old"}, 2), ({"batches_per_round": 2}, 2)):
        tuned, state = Affine(), State(CPU)
        steps = iterate(
            TiltMatching(num_inference_steps=2, **settings), Flow(tuned), Flow(BASE), slope, torch.linspace(-1, 1, 8)[:, None],
            stream(0), state, parameters=(tuned.offset, tuned.slope),
        )  # fmt: skip
        next(steps)
        assert len(state.old) == copied


def test_samples_that_are_dropped_are_counted() -> None:
    def reward(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) < 3, torch.nan, slope(x))

    state = State(CPU)
    x = torch.linspace(-1, 1, 11)[:, None]
    steps = iterate(
        TiltMatching(num_inference_steps=2), Flow(Affine()), Flow(BASE), reward, x, stream(0), state, non_finite="drop"
    )
    assert next(steps)["dropped"] == 3
    assert len(state.replay.batches[0].x) == 8


class Labelled(Affine):
    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, time) + 0 * label[:, None]


def test_weights_are_normalised_among_the_samples_of_a_condition() -> None:
    """Two classes whose rewards differ by an offset alone: that of a class teaches nothing."""

    def offset_reward(x: Tensor) -> Tensor:
        return torch.tensor([0.0, 50.0]).repeat(len(x) // 2)

    tuned, labels = Labelled(), torch.tensor([3, 8]).repeat(32)
    base = Flow(lambda x, time, label: BASE(x, time)).bind(labels)
    x = torch.randn(64, 1, generator=stream(0, "x"))
    several: tuple[Any, ...] = (TiltMatching, Ram, DiffusionNft)
    for method in (each(num_inference_steps=5) for each in several):
        tuned.zero_grad()
        state = method.new_state((1,), 0, CPU)
        next(iterate(method, Flow(tuned).bind(labels), base, offset_reward, x, stream(0), state))
        assert all((p.grad == 0).all() for p in tuned.parameters())


def test_the_kl_of_several_conditions_is_their_mean() -> None:
    """KL(N(h, 1) | N(0, 1)) = h^2 / 2, for h = 1/2 and 1."""
    x = torch.special.ndtri((torch.arange(COUNT) + 0.5).double() / COUNT).float()[:, None]
    labels = torch.arange(2).repeat(COUNT // 2)
    base = Flow(lambda x, time, label: BASE(x, time)).bind(labels)
    method = TiltMatching(beta=2.0, target_effective_sample_size=0, regression_batch_size=8)
    steps = iterate(method, Flow(Labelled()).bind(labels), base, lambda x: (1 + labels) * slope(x), x, stream(0), State(CPU))
    assert next(steps)["kl"] == pytest.approx((1 / 8 + 1 / 2) / 2, abs=0.005)


# ---- laws and mistakes ----


def test_which_law_each_preset_reaches() -> None:
    laws = {preset: TiltMatching(preset=preset).target(100) for preset in (None, *["implicit", "reverse", "reward-weighting"])}
    assert all(law.reaches == "exact" and not law.caveats and law.temperature == 1.0 for law in laws.values())
    law = TiltMatching(preset="explicit", beta=0.5).target(100)
    assert law.reaches == "first-order"
    assert "order 1 / rounds" in law.caveats[0]
    assert law.log_tilt(torch.ones(1)).item() == 2.0
    assert law.exact is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficient": "linear"}, "use replay 1"),
        ({"coefficient": "linear", "replay": 1, "anchor": "none"}, "needs anchor 'old'; around the base: ram"),
        ({"coefficient": "linear", "replay": 1, "anchor": "old", "proposal": "auto"}, "use proposal 'tuned'"),
        ({"preset": "ram"}, "preset 'ram' is the method 'ram' now"),
        ({"preset": "nft"}, "preset 'nft' is the method 'diffusion-nft' now"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TiltMatching(**settings)


def attempt(reward: Callable[[Tensor], Tensor], state: State | None = None, size: int = 8, **settings: Any) -> None:
    method = TiltMatching(num_inference_steps=2, **settings)
    tuned = Affine()
    x = torch.linspace(-1, 1, size)[:, None]
    next(
        iterate(
            method, Flow(tuned), Flow(BASE), reward, x, stream(0), state or State(CPU), parameters=tuple(tuned.parameters())
        )
    )


def test_rounds_that_cannot_be_learned_from_are_one_line() -> None:
    with pytest.raises(InputError, match="the reward is 2 for all 8 samples: there is nothing to learn from it"):
        attempt(lambda x: torch.full((len(x),), 2.0))
    spread = lambda x: torch.where(torch.arange(len(x)) == 0, 1e30, 0.0)  # noqa: E731
    with pytest.raises(CollapseError, match=r"batch 1: the rewards spread too far.*of 8 samples.*bound the reward"):
        attempt(spread)
    with pytest.raises(CollapseError, match=r"batch 1: the weights of the next law rest on 1.0 of 8 samples \(largest 8\)"):
        attempt(spread, target_effective_sample_size=0)
    attempt(lambda x: torch.where(torch.arange(len(x)) < 2, 1e30, 0.0), target_effective_sample_size=0)  # two are enough
    with pytest.raises(
        CollapseError, match=r"batch 2: the weights of the anchor rest on 1.0 of 8 samples.*or use anchor 'old'"
    ):
        attempt(lambda x: x[:, 0] * 100, State(CPU, tilt=1.0, aim=1.0, batches=1), replay=1)


def test_a_single_sample_teaches_nothing() -> None:
    assert "a single one has no other" in str(TiltMatching().learns_nothing(1))
    assert TiltMatching().learns_nothing(2) is None
    attempt(slope, size=1, preset="explicit")  # it is said before, and is no mistake of the reward
