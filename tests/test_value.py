"""Value functions: their forms, their losses against known value functions, and the refusal of a broken boundary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.control.value import FORMS, Critic, Experience, Value, critic_loss, improve, returns
from tiltflow.errors import InputError, NonFiniteError, SettingsError
from tiltflow.flows.field import FunctionField
from tiltflow.laws.lqg import Lqg, evaluate_chain
from tiltflow.networks.image_critic import ImageCritic
from tiltflow.networks.mlp import Mlp
from tiltflow.networks.quadratic import Quadratic
from tiltflow.networks.token_critic import TokenCritic
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

PROBLEM, BETA, STEPS = Lqg(), 0.5, 10


class Affine(nn.Module):
    """F(x, t) = a . x + b t."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([0.5, -1.0])), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x @ self.a + self.b * t)[:, None]


def reward(x: Tensor) -> Tensor:
    return x.square().sum(1)


def broken_at_the_end(t: Tensor) -> tuple[Tensor, Tensor]:
    return t, torch.ones_like(t)


# ---- the form ----


@pytest.mark.parametrize("name", FORMS)
def test_every_form_ends_in_the_reward(name: str) -> None:
    skip, out = FORMS[name](torch.tensor([0.0, 0.4, 1.0]))
    assert (skip[-1].item(), out[-1].item()) == pytest.approx((1, 0))
    assert out[0] == 1


def test_forms_are_those_of_the_paper_in_our_time() -> None:
    """Its time is 1 - t: cos(pi s / 2) and sin(pi s / 2), 1 - s and s."""
    t = torch.linspace(0, 1, 7)
    assert_close(FORMS["cos-sin"](t), (torch.cos(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * (1 - t))))
    assert_close(FORMS["linear"](t), (t, 1 - t))
    assert_close(FORMS["constant-skip"](t), (torch.ones(7), torch.sin(math.pi / 2 * (1 - t))))


@pytest.mark.parametrize("name", FORMS)
def test_value_and_gradient_by_hand(name: str, generator: torch.Generator) -> None:
    """x1hat = x + (1 - t) v; the gradient against finite differences."""
    value, t = Value(Affine(), FORMS[name]), torch.tensor(0.3)
    value.fit_scale(torch.tensor([1.0, 5.0]))
    free = name == "reward-free"
    assert (value.shift, value.scale) == (3 if free else 0, 2)
    x = torch.randn(4, 2, generator=generator)

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) * (1 + t)

    def total(x: Tensor) -> Tensor:
        return value.known(x + 0.7 * flow(x, t), t, reward) + value.learned(x, t)

    skip, out = (part.item() for part in FORMS[name](t))
    expected = skip * reward(x + 0.7 * 1.3 * torch.sin(x)) + out * (value.shift + 2 * (x @ torch.tensor([0.5, -1.0]) + 0.6))
    assert_close(total(x), expected)
    h = 1e-6
    differences = [(total(x + h * e) - total(x - h * e)) / (2 * h) for e in torch.eye(2)]
    assert_close(value.gradient(x, t, FunctionField(flow), reward), torch.stack(differences, 1), atol=1e-7, rtol=1e-6)


def test_the_reward_is_not_asked_where_it_has_no_part() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("asked")

    value, x = Value(Affine(), FORMS["reward-free"]), torch.ones(3, 2)
    assert not value.known(x, torch.tensor(0.5), never).any()
    assert value.gradient(x, torch.tensor(0.5), FunctionField(lambda x, t: x), never).shape == x.shape


def test_the_scale_is_set_once_and_never_zero() -> None:
    value = Value(Affine(), FORMS["reward-free"])
    value.fit_scale(torch.tensor([2.0, 2.0]))
    assert (value.shift, value.scale) == (2, 1)
    value.fit_scale(torch.tensor([5.0, 9.0]))
    assert (value.shift, value.scale) == (2, 1)


def test_a_broken_boundary_is_refused() -> None:
    with pytest.raises(InputError, match=r"V\(1, x\) must be r\(x\), so skip\(1\) must be 1 and out\(1\) 0, got 1 and 1"):
        Critic(form="test_value:broken_at_the_end").build((2,), 0, torch.device("cpu"))
    for form, message in (("cosin", "there is no form 'cosin'"), ("cos_sin", "did you mean 'cos-sin'")):
        with pytest.raises(SettingsError, match=message):
            Critic(form=form)


def test_networks_by_shape() -> None:
    critic, cpu = Critic(), torch.device("cpu")
    vector, image = critic.build((3,), 0, cpu), critic.build((1, 28, 28), 0, cpu)
    tokens, small = critic.build((16, 4), 0, cpu), critic.build((16, 4, 6), 0, cpu)
    assert [len(value.network.convolutions) for value in (image, small)] == [3, 2]
    for value, shape in ((vector, (5, 3)), (image, (5, 1, 28, 28)), (tokens, (5, 16, 4)), (small, (5, 16, 4, 6))):
        assert not value.learned(torch.randn(shape), torch.tensor(0.5)).any()  # zero at the start
    with pytest.raises(InputError, match=r"no default for samples of shape \[1, 4, 2, 4, 4\]"):
        critic.build((1, 4, 2, 4, 4), 0, cpu)
    same, other = critic.build((3,), 0, cpu), critic.build((3,), 1, cpu)
    weight = vector.network.body[0].weight
    assert torch.equal(weight, same.network.body[0].weight)
    assert not torch.equal(weight, other.network.body[0].weight)


def test_an_image_critic_sees_time_and_place() -> None:
    network = ImageCritic(image_size=(8, 8), channels=(4, 4), hidden=4, embedding=4).build()
    nn.init.normal_(network.head.weight)
    x = torch.randn(2, 1, 8, 8)
    values = network(x, torch.tensor([0.2, 0.2]))
    assert values.shape == (2, 1)
    assert (network(x, torch.tensor([0.7, 0.2])) != values).tolist() == [[True], [False]]
    assert (network(x.flip(-1), torch.tensor([0.2, 0.2])) != values).all()


def test_an_image_critic_sees_the_order_of_frames() -> None:
    """Of latents of videos, [channels, frames, height, width]."""
    value = Critic().build((2, 3, 4, 4), 0, torch.device("cpu"))
    nn.init.normal_(value.network.head.weight)  # type: ignore[union-attr, arg-type]
    x, t = torch.randn(2, 2, 3, 4, 4), torch.tensor(0.5)
    assert value.learned(x, t).shape == (2,)
    assert (value.learned(x.flip(2), t) != value.learned(x, t)).all()


def test_a_token_critic_sees_time_and_place_and_what_tokens_are_together() -> None:
    """The last by its second difference in two tokens, which is zero for any sum of functions of one each."""
    network = TokenCritic(tokens=6, channels=3, hidden=16).build().double()
    nn.init.normal_(network.head.weight)
    x = torch.randn(4, 6, 3, dtype=torch.float64)

    def at(x: Tensor, time: float = 0.2) -> Tensor:
        values: Tensor = network(x, torch.full((len(x),), time).double())
        return values

    assert at(x).shape == (4, 1)
    for other in (at(x, 0.7), at(x.flip(1))):
        assert (other - at(x)).abs().max() > 1e-4
    assert torch.allclose(at(x)[1:2], at(x[1:2]))
    first, second = (torch.zeros(1, 6, 3).double().index_fill(1, torch.tensor(i), 1.0) for i in (0, 1))
    together = at(x + first + second) - at(x + first) - at(x + second) + at(x)
    assert together.abs().max() > 1e-6


def test_a_quadratic_is_one() -> None:
    network = Quadratic(degree=1).build()
    with torch.no_grad():
        network.coefficients.copy_(torch.tensor([[1.0, 0.5], [2.0, 0.0], [0.0, 3.0]]))
    x, t = torch.tensor([[1.0, 2.0]]), torch.tensor([0.75])
    assert network(x, t).item() == pytest.approx((1 + 0.25) * 5 + 2 * 3 + 1.5)


# ---- returns ----


def test_returns_by_hand() -> None:
    values, costs = torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.tensor([[0.1], [0.2], [0.4]])
    assert_close(returns(values, costs, torch.ones(3)).flatten(), torch.tensor([7.3, 7.4, 7.6]))
    assert_close(returns(values, costs, torch.zeros(3)).flatten(), torch.tensor([1.9, 3.8, 7.6]))
    half = torch.tensor([0.5, 0.5, 0.5])
    assert_close(returns(values, costs, half).flatten(), torch.tensor([(2 + (4 + 7.6) / 2 - 0.2) / 2 - 0.1, 5.6, 7.6]))


def test_the_trace_decays_in_time() -> None:
    """Half the step size, the same process: the targets at the common times are the same."""
    critic = Critic(loss="td-lambda", trace=0.3)
    targets = []
    for steps in (4, 8):
        t = torch.linspace(0, 1, steps + 1)
        # V jumps at t = 1 only, so what is between the steps does not matter
        values = torch.cat([torch.zeros(steps, 1), torch.ones(1, 1)])
        keep = torch.exp(-t.diff() / critic.trace)
        targets.append(returns(values, torch.zeros(steps, 1), keep)[:: steps // 4])
    later = math.exp(-0.125 / 0.3)  # the first of the two steps before the end of the coarse grid looks further
    assert_close(targets[1], targets[0] * later)


# ---- losses ----


def lqg_batch(count: int, generator: torch.Generator, steps: int = STEPS) -> tuple[Experience, Any]:
    """Trajectories of the problem's policy, in the diffusion's own coordinates, and the exact values (P, p, c) of each step."""
    D, K, k = PROBLEM.T / steps, PROBLEM.K, PROBLEM.k
    x, states, costs = torch.randn(count, 1, generator=generator), [], []
    for _ in range(steps):
        u = K * x + k
        states.append(x)
        costs.append(BETA / 2 * D * u.square().sum(1))
        x = x + D * (-x / 2 + u) + D**0.5 * torch.randn(count, 1, generator=generator)
    rewards = (PROBLEM.q * x - PROBLEM.Q * x.square() / 2).sum(1)
    exact = evaluate_chain(PROBLEM, BETA, np.full(steps, K), np.full(steps, k))
    times = torch.linspace(0, 1, steps + 1)
    batch = Experience(torch.stack(states), times, torch.zeros(steps, count), torch.stack(costs), rewards)
    return batch, np.array([exact.value(n) for n in range(steps)])


class PerStep(nn.Module):
    """-P_k x^2 / 2 + p_k x + c_k with free numbers for every step."""

    def __init__(self, start: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(start).clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        P, p, c = self.table[(t * len(self.table)).round().long()].T
        return (-P * x[:, 0] ** 2 / 2 + p * x[:, 0] + c)[:, None]


def per_step(start: Any) -> Value:
    value = Value(PerStep(start), FORMS["reward-free"])
    value.fitted = True
    return value


LOSSES = ("martingale", "td", "td-lambda", "orthogonality")


@pytest.mark.parametrize("loss", LOSSES)
def test_the_exact_value_function_is_a_fixed_point(loss: str, generator: torch.Generator) -> None:
    """There the mean gradient is zero: z-scores of its 30 entries over 200 batches."""
    gradients = []
    for _ in range(200):
        batch, exact = lqg_batch(64, generator)
        value = per_step(exact)
        critic_loss(value, batch, Critic(loss=loss)).backward()
        gradients.append(value.network.table.grad.flatten())
    stacked = torch.stack(gradients)
    z = stacked.mean(0) / (stacked.std(0) / len(gradients) ** 0.5)
    assert z.abs().max() < 4.2  # 30 normal draws exceed it once in 1,200


@pytest.mark.parametrize("loss", LOSSES)
def test_elsewhere_the_gradient_leads_back(loss: str, generator: torch.Generator) -> None:
    batch, exact = lqg_batch(4096, generator)
    for sign in (1, -1):
        value = per_step(exact + sign * np.array([0.0, 0.0, 0.3]))
        critic_loss(value, batch, Critic(loss=loss)).backward()
        last = value.network.table.grad[-1, 2].item()  # a constant that is wrong at all steps shows at the last
        assert sign * last > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_recovers_the_value_function(loss: str, generator: torch.Generator) -> None:
    """P, p and c half way, from zero, against the spread of the best fit to as many trajectories: 0.08 at 512."""
    value = per_step(np.zeros((STEPS, 3)))
    critic = Critic(loss=loss, num_steps=1, trace=0.3)
    optimizer = torch.optim.Adam(value.network.parameters(), lr=0.03)
    for i in range(800):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - i / 800)
        batch, exact = lqg_batch(256, generator)
        improve(value, optimizer, batch, critic, generator, i)
    found = value.network.table.detach().numpy()
    assert np.abs(found[5] - exact[5]).max() < 0.08
    assert np.abs(found[1] - exact[1]).max() < 0.12


def test_the_mean_square_td_error_would_be_wrong(generator: torch.Generator) -> None:
    """Its minimiser on a fine grid: V is made flat where it should vary, because the noise of a step dwarfs its drift."""
    batch, exact = lqg_batch(1024, generator, steps=100)
    right, flat = per_step(exact), per_step(exact * 0.0)
    errors = []
    for value in (right, flat):
        increments = batch.values(value).diff(dim=0)[:-1] - batch.costs[:-1]
        errors.append(increments.square().sum(0).mean().item())
    assert errors[1] < 0.1 * errors[0]  # before the last step the wrong one looks better by far
    losses = [critic_loss(value, batch, Critic()).item() for value in (right, flat)]
    assert losses[0] < losses[1]


class Sketch:
    """Four trajectories of three steps that begin at t = 0.2, with a value in units of 2.5 and costs, and what Affine says."""

    def __init__(self, generator: torch.Generator):
        self.value = Value(Affine(), FORMS["reward-free"])
        self.value.shift, self.value.scale, self.value.fitted = 0.7, 2.5, True
        states, self.times = torch.randn(3, 4, 2, generator=generator), torch.tensor([0.2, 0.5, 0.6, 1.0])
        self.costs, self.rewards = torch.rand(3, 4, generator=generator), torch.randn(4, generator=generator)
        self.batch = Experience(states, self.times, torch.zeros(3, 4), self.costs, self.rewards)
        t = self.times[:3, None, None].expand(3, 4, 1)
        self.features = torch.cat([states, t], 2)  # dV / d(a, b), over the scale
        inside = 0.7 + 2.5 * (self.features @ torch.tensor([0.5, -1.0, 2.0]))
        self.values = torch.cat([inside, self.rewards[None]])

    def gradient(self) -> Tensor:
        network = self.value.network
        return torch.cat([network.a.grad, network.b.grad[None]])


def test_the_td_loss_by_hand(generator: torch.Generator) -> None:
    """Half the square of the TD error in units of the scale, weighted by the steps' shares 3/8, 1/8 and 4/8 of the way."""
    sketch = Sketch(generator)
    error = (sketch.values[1:] - sketch.costs - sketch.values[:-1]) / 2.5
    weights = torch.tensor([3.0, 1.0, 4.0])[:, None] / 8
    loss = critic_loss(sketch.value, sketch.batch, Critic(loss="td"))
    assert loss.item() == pytest.approx(((weights * error**2).sum(0).mean() / 2).item())
    loss.backward()
    expected = -((weights * error)[..., None] * sketch.features).sum(0).mean(0)
    assert_close(sketch.gradient(), expected)


def test_the_orthogonality_loss_by_hand(generator: torch.Generator) -> None:
    """The moments of two halves, multiplied; the gradient is of the second, along the first, through the increments alone."""
    sketch = Sketch(generator)
    increments = (sketch.values.diff(dim=0) - sketch.costs) / 2.5
    moments = [(increments[:, half, None] * sketch.features[:, half]).sum(0).mean(0) for half in (slice(2), slice(2, 4))]
    loss = critic_loss(sketch.value, sketch.batch, Critic(loss="orthogonality"))
    assert loss.item() == pytest.approx((moments[0] @ moments[1]).item())
    loss.backward()
    after = torch.cat([sketch.features[1:], torch.zeros(1, 4, 3)])  # the reward at the end does not depend on the weights
    along = sketch.features @ moments[0]
    change = (along[..., None] * (after - sketch.features))[:, 2:]
    assert_close(sketch.gradient(), change.sum(0).mean(0))


def test_the_trace_lies_between_td_and_martingale(generator: torch.Generator) -> None:
    batch, exact = lqg_batch(64, generator)
    value = per_step(exact + 0.3)
    td, between, monte_carlo, short, long = (
        critic_loss(value, batch, critic).item()
        for critic in (
            Critic(loss="td"),
            Critic(loss="td-lambda", trace=0.2),
            Critic(loss="martingale"),
            Critic(loss="td-lambda", trace=1e-6),
            Critic(loss="td-lambda", trace=1e9),
        )
    )
    assert short == pytest.approx(td)
    assert long == pytest.approx(monte_carlo)
    values, keep = batch.values(value).detach(), torch.full((STEPS,), math.exp(-0.1 / 0.2))  # ten steps of 0.1
    errors = returns(values, batch.costs, keep) - values[:-1]
    assert between == pytest.approx(errors.square().mean().item() / 2)
    assert td != pytest.approx(between)
    assert between != pytest.approx(monte_carlo)


def test_the_loss_does_not_depend_on_the_number_of_steps(generator: torch.Generator) -> None:
    losses = []
    for steps in (100, 400):
        batch, exact = lqg_batch(4096, generator, steps=steps)
        losses.append(critic_loss(per_step(exact + 0.3), batch, Critic()).item())
    assert losses[0] == pytest.approx(losses[1], rel=0.08)


def test_improve_takes_its_steps_on_some_trajectories(generator: torch.Generator) -> None:
    batch, exact = lqg_batch(32, generator)
    value = per_step(exact * 0.0)
    optimizer = torch.optim.SGD(value.network.parameters(), lr=0.1)
    seen = []
    network = value.network
    network.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    first = improve(value, optimizer, batch, Critic(num_steps=3, train_batch_size=8), generator, 1)
    assert seen == 3 * [8 * STEPS]
    assert first > 0
    assert improve(value, optimizer, batch, Critic(num_steps=0), generator, 1) == 0
    with pytest.raises(InputError, match="at least two trajectories"):
        critic_loss(value, batch.part(torch.tensor([0])), Critic(loss="orthogonality"))
    broken = Experience(batch.states, batch.times, batch.known, batch.costs, batch.rewards * math.nan)
    with pytest.raises(NonFiniteError, match="the critic's loss is nan"):
        improve(value, optimizer, broken, Critic(), stream(0), 7)


def test_a_perceptron_can_be_a_value_function() -> None:
    assert Mlp(dimension=3, outputs=1).build()(torch.randn(4, 3), torch.rand(4)).shape == (4, 1)


def test_the_parts_of_an_image_critic() -> None:
    """Channels of any widths; time is embedded in thousandths; a scale of 1 doubles what a convolution gives, and a shift
    is added."""
    network: Any = ImageCritic(image_size=(16, 8), channels=(3, 5, 2), hidden=4, embedding=4).build()
    with torch.no_grad():
        network.head.weight.fill_(1.0)
        for layer in network.modulations:
            layer.weight.zero_()
            layer.bias.zero_()
            layer.bias[: len(layer.bias) // 2] = 1.0
            layer.bias[len(layer.bias) // 2 :] = 0.25
    x, time, seen = torch.randn(6, 1, 16, 8, generator=stream(0, "x")), torch.full((6,), 0.25), list[Tensor]()
    handle = network.time[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    scaled = network(x, time)
    handle.remove()
    frequencies = torch.tensor([1.0, 0.01])  # 10,000 to the power of -i / 2
    angles = 250 * frequencies
    assert torch.allclose(seen[0][0].sort().values, torch.cat([angles.sin(), angles.cos()]).sort().values, atol=1e-4)
    with torch.no_grad():
        for convolution, layer in zip(network.convolutions, network.modulations, strict=True):
            convolution.weight *= 2
            convolution.bias.mul_(2).add_(0.25)
            layer.bias.zero_()
    assert scaled.std() > 0
    assert torch.allclose(network(x, time), scaled, atol=1e-5)
