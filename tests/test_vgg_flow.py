"""VGG-Flow: its fixed points on a Gaussian, with the value network and without, against the exact control; its cost, words."""

from __future__ import annotations

from collections import Counter
from typing import Any

import affine
import numpy as np
import pytest
import torch
from affine import Affine, Controlled, on_gaussian, riccati
from tiny import iterate
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.flows.field import FunctionField
from tiltflow.laws.gaussian_mixture import QuadraticReward
from tiltflow.laws.law import Law, log_normal
from tiltflow.methods.vgg_flow import State, VggFlow, default_network
from tiltflow.problems.two_modes import TwoModes
from tiltflow.samplers.chain import Chain
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

REWARD = QuadraticReward(torch.tensor([affine.LINEAR], dtype=torch.float64), affine.QUADRATIC)
CPU = torch.device("cpu")
STEPS = 10


def optimum(chain: Chain, beta: float) -> tuple[Tensor, Tensor]:
    """u_k = slope_k x + shift_k that minimise sum_k h_k u_k^2 / 2 - r(x_K) / beta: Riccati's recursion for a control of which a
    unit moves x_{k+1} by sqrt(h_k)."""
    base, h = on_gaussian(chain), chain.v_scale
    slope, shift = riccati(Affine(base.gain, base.offset, h.sqrt()), affine.LINEAR / beta, affine.QUADRATIC / beta)
    return slope / h.sqrt(), shift / h.sqrt()


class Missing(nn.Module):
    """What g_k = - beta u_k is more than the reward's gradient at predicted samples, plus a number of each step."""

    def __init__(self, tuned: Controlled, beta: float):
        super().__init__()
        self.tuned, self.beta, self.away = [tuned], beta, nn.Parameter(torch.zeros(STEPS))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        (tuned,) = self.tuned
        k = (t.reshape(-1, 1) - tuned.times).abs().argmin(1)
        with torch.no_grad():
            u = tuned.slope[k, None] * x + tuned.shift[k, None]
            predicted = x + (1 - t.reshape(-1, 1)) * tuned(x, t)
            prior = -(t.reshape(-1, 1) ** 2) * (affine.LINEAR - affine.QUADRATIC * predicted)
        return -self.beta * u - prior + self.away[k, None]


def once(method: VggFlow, tuned: Any, state: State, reward: Any = REWARD, **options: Any) -> dict[str, float]:
    x, fields = torch.randn(12, 1, generator=stream(0)), (FunctionField(tuned), FunctionField(affine.velocity))
    (measured,) = iterate(method, *fields, reward, x, stream(1), state, **options)
    return measured


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_fixed_point_is_the_optimal_control(beta: float, micro_batch_size: int | None) -> None:
    """Both losses vanish at the adjoint of the optimal control, and each of them nowhere near."""
    method = VggFlow(num_inference_steps=STEPS, beta=beta)
    chain = method.sampling.chain()
    slope, shift = optimum(chain, beta)
    for k in (None, *range(STEPS)):
        tuned = Controlled(chain, slope, shift)
        network = Missing(tuned, beta)
        state = State(network, torch.optim.SGD(network.parameters(), 0.0), 1.0)
        if k is not None:
            network.away.data[k] = 0.1
        measured = once(method, tuned, state, micro_batch_size=micro_batch_size)
        if k is None:
            assert measured["loss"] < 1e-22
            assert measured["critic_loss"] < 1e-22
        else:
            assert measured["loss"] == pytest.approx(0.1 * (0.1 / beta) ** 2)
            assert network.away.grad is not None
            assert network.away.grad[k] == pytest.approx(2 * 0.1 * 0.1)  # h_k times 2 away, whatever the steps around it
            assert measured["critic_loss"] > 0.99 * 0.1 * 0.1**2
    away = Controlled(chain, slope, shift + 0.1)
    network = Missing(away, beta)
    measured = once(method, away, State(network, torch.optim.SGD(network.parameters(), 0.0), 1.0))
    assert measured["critic_loss"] > 1e-4  # consistent with no reward's gradient at the end


def test_temporal_differences_carry_the_gradient_back() -> None:
    """From nothing, each step of an exact fit of nu takes the gradient of the value one step further from the end: after as
    many as the chain has it is the adjoint along the paths."""
    method = VggFlow(num_inference_steps=STEPS, beta=1.0)
    chain = method.sampling.chain()
    tuned = Controlled(chain, torch.zeros(STEPS), torch.zeros(STEPS))  # held fixed
    linear = lambda x: x[:, 0]  # noqa: E731
    gain = on_gaussian(chain).gain
    adjoints = torch.stack([-gain[k + 1 :].prod() for k in range(STEPS)])

    class PerStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.zeros(STEPS))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.values[(t.reshape(-1, 1) - chain.times).abs().argmin(1), None].expand_as(x)

    network = PerStep()
    state = State(network, torch.optim.SGD(network.parameters(), 0.5 / 0.1), 1.0)  # the exact fit of a square of weight h
    prior = -(chain.times[:-1] ** 2)
    for done in range(1, STEPS + 1):
        once(method, tuned, state, linear)
        g = prior + network.values.detach()
        torch.testing.assert_close(g[STEPS - done :], adjoints[STEPS - done :])
    torch.testing.assert_close(g, adjoints)


def test_the_fixed_point_without_a_network() -> None:
    """v = v_base + t^2 (c - q (x + (1 - t) v)) / beta, which is affine in x; there the loss is zero, and nowhere near."""
    beta = 0.4
    method = VggFlow(num_inference_steps=STEPS, beta=beta, value_network=False)
    chain = method.sampling.chain()
    t = chain.times[:-1]
    stiff = 1 + t**2 / beta * affine.QUADRATIC * (1 - t)
    base_slope, base_shift = affine.slope(t), affine.MEAN * (1 - affine.slope(t) * t)
    slope = (base_slope - t**2 / beta * affine.QUADRATIC) / stiff - base_slope
    shift = (base_shift + t**2 / beta * affine.LINEAR) / stiff - base_shift
    measured = once(method, tuned := Controlled(chain, slope, shift), State())
    assert measured["loss"] < 1e-24
    assert "critic_loss" not in measured
    assert tuned.slope.grad is not None
    assert tuned.slope.grad.abs().max() < 1e-12
    for k in range(STEPS):
        away = Controlled(chain, slope, shift + 0.1 * (torch.arange(STEPS) == k))
        assert once(method, away, State(), micro_batch_size=5)["loss"] > 0.1 * 0.1**2 / 2
        assert away.shift.grad is not None
        assert away.shift.grad[k] > 0.01


def test_the_scale_of_the_network_is_that_of_the_first_gradients() -> None:
    """nu in units of the root mean square of the reward's gradient at the ends."""
    method = VggFlow(num_inference_steps=STEPS)
    tuned = Controlled(method.sampling.chain(), torch.zeros(STEPS), torch.zeros(STEPS))
    state = method.new_state((1,), 0, CPU)
    once(method, tuned, state, lambda x: 300 * x[:, 0])
    assert state.scale == pytest.approx(300)
    again = method.new_state((1,), 1, CPU)
    again.load_state_dict(state.state_dict())
    x, t = torch.randn(5, 1, generator=stream(3)).float(), torch.tensor(0.4)
    assert torch.equal(again.nu(x, t), state.nu(x, t))
    assert state.nu(x, t).abs().max() > 0
    constant = method.new_state((1,), 0, CPU)
    assert once(method, tuned, constant, lambda x: 0 * x[:, 0] + 3)["loss"] == 0
    assert constant.scale == 1


@pytest.mark.parametrize("value_network", [True, False])
def test_its_cost(value_network: bool) -> None:
    """A gradient of the reward for each step; and with the network a vector-Jacobian product of the base."""
    asked: Counter[str] = Counter()

    def base(x: Tensor, t: Tensor) -> Tensor:
        asked["with a gradient" if x.requires_grad else "without"] += 1
        return affine.velocity(x, t.reshape(-1, 1))

    def reward(x: Tensor) -> Tensor:
        asked["reward"] += 1
        return x[:, 0]

    method = VggFlow(num_inference_steps=4, value_network=value_network)
    tuned = Controlled(method.sampling.chain(), torch.zeros(4), torch.zeros(4))
    x = torch.randn(3, 1, generator=stream(0))
    list(iterate(method, FunctionField(tuned), FunctionField(base), reward, x, stream(1), method.new_state((1,), 0, CPU)))
    assert asked == {"reward": 4, "with a gradient" if value_network else "without": 4}


def test_samples_without_a_reward_are_left_out() -> None:
    method = VggFlow(num_inference_steps=6, value_network=False)
    found = []
    for size in (None, 5):
        tuned = Controlled(method.sampling.chain(), torch.full((6,), 0.1), torch.full((6,), 0.2))
        limited = lambda x: torch.where(x[:, 0] > 1.2, torch.nan, REWARD(x))  # noqa: E731
        measured = once(method, tuned, State(), limited, micro_batch_size=size, non_finite="drop")
        assert 0 < measured["dropped"] < 11
        found.append((measured, tuned.slope.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_its_law_is_that_of_the_transport() -> None:
    law = VggFlow(beta=1.0).target(1).law(Law.of(lambda x: log_normal(x, 0.7, 0.5)), lambda x: 1.7 * x - 1.5 * x**2)
    assert (law.mean, law.variance) == pytest.approx((0.606394, 0.022195), abs=1e-4)


def test_words_and_refusals() -> None:
    target, nearly = VggFlow(beta=0.3).target(1), VggFlow(value_network=False).target(1)
    assert (target.reaches, target.temperature, target.beta, len(target.caveats)) == ("none", None, 0.3, 1)
    assert (nearly.words[-8:], len(nearly.caveats)) == (", nearly", 2)
    with pytest.raises(ValueError, match="without a value network is not known"):
        nearly.law(None, None)  # type: ignore[arg-type]
    assert (VggFlow().beta, VggFlow().num_inference_steps, VggFlow().optimizer_defaults["learning_rate"]) == (1e-3, 20, 1e-4)
    assert VggFlow().needs.critic_of_condition == "method.value_network"
    assert VggFlow(value_network=False).needs.critic_of_condition is None
    assert [default_network(shape).name for shape in ((3,), (1, 8, 8))] == ["mlp", "unet"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"no default for samples of shape \[5, 4\]; give one, or value_network: false"):
        default_network((5, 4))


N, KNOTS = 1000, 20


def settled(beta: float, path: tuple[list[Tensor], list[Tensor]] | None = None, iterations: int = 50) -> Any:
    """The control that follows the adjoint along its own paths, on two modes under tanh(x), from none or from another one: its
    knots and values at each step, and E r, P(x > 0) and E r - beta / 2 integral u^2."""
    base, h = TwoModes().base(), 1 / KNOTS
    noise = torch.special.ndtri((torch.arange(N) + 0.5) / N)
    knots, controls = path or ([noise] * KNOTS, [torch.zeros(N)] * KNOTS)
    found = (0.0, 0.0, 0.0)
    for _ in range(iterations):
        x, energy, walked = noise, 0.0, []
        for k in range(KNOTS):
            at = x.detach().requires_grad_()
            v = base.velocity(at[:, None], torch.full((N,), k * h))[:, 0]
            (slope,) = torch.autograd.grad(v.sum(), at)
            u = torch.from_numpy(np.interp(x, knots[k], controls[k]))
            walked.append((x, slope, u))
            x, energy = x + h * (v.detach() + u), energy + h * u.square().mean().item() / 2
        r = torch.tanh(x)
        found = (r.mean().item(), (x > 0).double().mean().item(), r.mean().item() - beta * energy)
        pull, knots, controls = 1 - r.square(), list(knots), list(controls)
        for k in reversed(range(KNOTS)):
            at, slope, u = walked[k]
            order = at.argsort()
            knots[k], controls[k] = at[order], (u + 0.3 * (pull / beta - u))[order]
            pull = pull * (1 + h * slope)
    return (knots, controls), found


def test_on_two_modes_the_adjoint_has_two_fixed_points() -> None:
    """Whichever way the adjoint is found. From no control it settles where the modes nearly keep their shares, at less than the
    best value; from a strong control that is weakened bit by bit, near the best transport, whose value it has."""
    best = VggFlow(beta=1.0).target(KNOTS).exact(TwoModes().law(), np.tanh)  # type: ignore[misc]
    _, (reward, positive, value) = settled(1.0)
    assert (reward, positive) == (pytest.approx(0.434, abs=0.01), pytest.approx(0.756, abs=0.01))
    path, _ = settled(0.3)
    for beta in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        path, _ = settled(beta, path, 8)
    _, annealed = settled(1.0, path)
    assert annealed[:2] == (pytest.approx(best.expectation(np.tanh), abs=0.03), pytest.approx(best.positive, abs=0.03))
    assert annealed[2] > value + 0.08
