r"""Value functions: V(t, x) = E[ r(x_1) - running cost from t on | x_t = x ], learned, with V(1, x) = r(x) by construction.

    V(t, x) = skip(t) r(x1hat(t, x)) + out(t) F(t, x)                                    (2502.01819, eq. 20)

x1hat is the denoised sample of the current flow, F a network. What makes V right is that V(t, x_t) - (cost until t) is a
martingale along the trajectories of the policy. Every loss below asks for that in another way. All are sums over the steps
weighted by their length, so that none depends on how many there are:

    martingale      (G_t - V(t, x_t))^2, with G_t the return from t on: continuous Monte Carlo. Unbiased, noisy.
    td              the same with G_t replaced by V a step later minus the cost of the step, held fixed (semi-gradient TD(0)).
    td-lambda       the same with the mixture of all such targets, the one s ahead weighing exp(-s / trace): the trace decays
                    in time, not in steps, so it means the same on every grid. trace -> 0 is td, infinity is martingale.
    orthogonality   |E sum_k dV/dtheta(t_k, x_k) (V_{k+1} - V_k - cost_k)|^2: increments orthogonal to all that V can vary.

There is no mean square of the TD error V_{k+1} - V_k - cost_k here. As the steps shrink, its minimum is not the value
function but the V with the least quadratic variation: the noise of a step is of order sqrt(h), what is learned of order h.
(Losses and this remark: Jia & Zhou, Policy evaluation and temporal-difference learning in continuous time, JMLR 2022.)
"""

# Mutation tests: test_value.py

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows.field import VelocityField, Which
from tiltflow.flows.interpolant import expand
from tiltflow.flows.linearize import linearize
from tiltflow.optimization import finite
from tiltflow.plugins import find, import_function, part_of
from tiltflow.rewards import NonFiniteRewards, Reward
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.rewards.functions.checked import value_and_gradient as reward_and_gradient
from tiltflow.settings import FunctionOrName, Settings
from tiltflow.streams import Buildable, new_network, stream
from tiltflow.timing import phase
from tiltflow.user_code import explained

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Form = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Times t -> (skip, out), of the shape of t; (1, 0) at t = 1."""

FORMS: dict[str, Form] = {
    # the reward never enters but at the end: for rewards that are slow or have no gradient
    "reward-free": lambda t: ((t >= 1).to(t), (t < 1).to(t)),
    # V is r(x1hat) minus a Jensen gap that hardly depends on x where the posterior's width does not
    "constant-skip": lambda t: (torch.ones_like(t), torch.cos(math.pi / 2 * t)),
    "cos-sin": lambda t: (torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)),
    "linear": lambda t: (t, 1 - t),
}


class Critic(Settings):
    """A value function and how it is learned."""

    form: FunctionOrName = "reward-free"
    """reward-free, constant-skip, cos-sin (the paper's), linear, or `package.module:function`, a function of your own from
    times to (skip, out)."""
    network: Annotated[Any, BeforeValidator(part_of("networks"))] | None = None
    """F: (x [batch, *event], time [batch]) -> [batch, 1]. By default a perceptron for vectors, convolutions for images, and for
    sequences of tokens a perceptron of each."""
    loss: Literal["martingale", "td", "td-lambda", "orthogonality"] = "martingale"
    """The loss that makes it the value function: see the top of `tiltflow.control.value`."""
    trace: Positive = 0.2
    """Of td-lambda: the time, of the 1 between noise and data, over which a target forgets the return."""
    learning_rate: Positive = 1e-3
    """Learning rate of its own Adam."""
    num_steps: Annotated[int, Field(ge=0)] = 4
    """Optimizer steps on each batch of trajectories; 0 leaves the value function as it is."""
    train_batch_size: Count | None = None
    """Trajectories in each of them; all by default."""

    @field_validator("form")
    @classmethod
    def _known(cls, form: str) -> str:
        if form not in FORMS and ":" not in form:
            raise ValueError(f"there is no form {form!r}{did_you_mean(form, FORMS)}")
        return form

    def build(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> Value:
        """An untrained value function. Raises InputError if the form cannot be imported or breaks the boundary condition
        V(1, x) = r(x), or if no network fits the samples."""
        form = FORMS.get(self.form) or _form_of_the_user(self.form)
        skip, out = (float(part) for part in form(torch.ones((), dtype=torch.float64)))
        if abs(skip - 1) > 1e-6 or abs(out) > 1e-6:
            raise InputError(
                f"critic.form {self.form}: V(1, x) must be r(x), so skip(1) must be 1 and out(1) 0, got {skip:g} and {out:g}"
            )
        network = new_network(cast(Buildable, self.network or default_network(event_shape)), stream_seed(seed)).to(device)
        return Value(network, form)


def _form_of_the_user(path: str) -> Form:
    function = import_function(path, "critic.form")

    def form(t: Tensor) -> tuple[Tensor, Tensor]:
        with explained(f"critic.form {path}"):
            skip, out = function(t.clone())
        return skip, out

    return form


def stream_seed(seed: int) -> int:
    """Seed of the network, different from the tuned network's."""
    return stream(seed, "critic").initial_seed()


def default_network(event_shape: tuple[int, ...]) -> Settings:
    """A network F for samples of this shape. Raises InputError if there is none."""
    network: Settings
    match len(event_shape):
        case 1:
            network = find("networks", "mlp")(dimension=event_shape[0], outputs=1)
        case 2:
            network = find("networks", "token-critic")(tokens=event_shape[0], channels=event_shape[1])
        case 3 | 4:
            size = event_shape[-2:]
            halvings = max(1, min(3, min(size).bit_length() - 1))  # no more than leave a pixel
            channels, of_images = (32, 64, 64)[:halvings], math.prod(event_shape[:-2])
            network = find("networks", "image-critic")(image_channels=of_images, image_size=size, channels=channels)
        case _:
            raise InputError(f"critic.network: there is no default for samples of shape {list(event_shape)}; give one")
    return network


class Value:
    """V(t, x) = skip(t) r(x1hat) + out(t) (shift + scale F(x, t)). `shift` and `scale` are set once, by the first rewards."""

    def __init__(self, network: nn.Module, form: Form):
        self.network, self.form = network, form
        self.shift, self.scale, self.fitted = 0.0, 1.0, False

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`."""
        scale = {"shift": self.shift, "scale": self.scale, "fitted": self.fitted}
        return {"network": self.network.state_dict(), **scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.shift, self.scale, self.fitted = state["shift"], state["scale"], state["fitted"]

    def fit_scale(self, rewards: Tensor) -> None:
        """Put F's outputs in units of the rewards [batch], unless that was done before."""
        if not self.fitted:
            free = float(self.form(torch.full((), 0.5, dtype=torch.float64))[0]) == 0
            self.shift = rewards.mean().item() if free else 0.0
            self.scale, self.fitted = rewards.std(correction=0).item() or 1.0, True

    def known(self, denoised: Tensor, t: Tensor, reward: Reward, non_finite: NonFiniteRewards = "error") -> Tensor:
        """skip(t) r(x1hat) [batch], for x1hat [batch, *event]; the reward is not asked where skip is 0. With `drop`, NaN where
        it is not finite."""
        skip = self.form(t)[0]
        if not skip.any():
            return denoised.new_zeros(len(denoised))
        return skip * evaluate(reward, denoised, non_finite)

    def learned(self, x: Tensor, t: Tensor) -> Tensor:
        """out(t) (shift + scale F(x, t)): [batch], for t [] or [batch]."""
        out = self.form(t)[1].to(x)
        own = next((p.dtype for p in self.network.parameters()), x.dtype)
        free: Tensor = self.network(x.to(own), t.to(x.device, own).expand(len(x))).reshape(len(x)).to(x.dtype)
        return out * (self.shift + self.scale * free)

    def gradient(self, x: Tensor, t: Tensor, flow: VelocityField, reward: Reward) -> Tensor:
        """grad_x V(t, x): [batch, *event]. The reward's part goes through x1hat, hence through the flow's network.

        Raises InputError if that part is there and the reward has no gradient.
        """
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (total,) = torch.autograd.grad(self.learned(y, t).sum(), y)
        skip = self.form(t)[0]
        if skip.any():
            v, pullback = linearize(flow, x, t)
            left = expand(1 - t, x)
            _, gradient = reward_and_gradient(reward, x + left * v)
            total = total + expand(skip, x) * (gradient + pullback(left * gradient.to(x)))
        return total


@dataclass(frozen=True)
class Experience:
    """Trajectories as the critic sees them: the numbers of all, and the states of those that this process has.

    Args:
        states: x_k [steps, own, *event], as they are stored, at the `times` [steps + 1], the last being the end.
        known: skip(t_k) r(x1hat_k), [steps, batch].
        costs: running costs of the steps, [steps, batch].
        rewards: [batch].
        own: which of the trajectories the states are of; all by default.
        counted: which of these this process counts in a sum over all, [own]; all by default.
    """

    states: Tensor
    times: Tensor
    known: Tensor
    costs: Tensor
    rewards: Tensor
    own: Which = field(default_factory=lambda: slice(None))
    counted: Tensor | Literal[True] = True

    def part(self, which: Tensor) -> Experience:
        """These of the trajectories; in a process that counts none of them with another one, not counted, for the network."""
        places = torch.full((len(self.rewards),), -1, device=which.device)
        rows = torch.arange(self.states.shape[1], device=which.device)
        places[self.own] = torch.where(torch.as_tensor(self.counted, device=which.device), rows, -1)
        rows, counted = places[which], places[which] >= 0
        own = counted.nonzero()[:, 0] if counted.any() else counted.new_zeros(1, dtype=torch.long)
        states = self.states[:, rows[own].clamp(min=0).to(self.states.device)]
        known, costs, rewards = self.known[:, which], self.costs[:, which], self.rewards[which]
        return Experience(states, self.times, known, costs, rewards, own, counted[own])

    def values(self, value: Value) -> Tensor:
        """V at the states, and the rewards at the end: [steps + 1, own]."""
        known, rewards = self.known[:, self.own], self.rewards[self.own]
        steps, batch = known.shape
        times = self.times[:-1].to(known.device)
        if torch.is_grad_enabled():
            states = self.states.flatten(0, 1).to(known)
            learned = value.learned(states, times.repeat_interleave(batch)).reshape(steps, batch)
        else:  # step by step: activations of all steps are several copies of the states
            learned = torch.stack([value.learned(x.to(known), t) for x, t in zip(self.states, times, strict=True)])
        return torch.cat([known + learned, rewards[None].to(learned)])


def returns(values: Tensor, costs: Tensor, keep: Tensor) -> Tensor:
    """Targets G_k = keep_k G_{k+1} + (1 - keep_k) V_{k+1} - cost_k with G at the end the reward: [steps, batch].

    Args:
        values: V at all states, the reward last, [steps + 1, batch].
        keep: [steps]. All ones give the returns, all zeros the targets of TD(0).
    """
    G, targets = values[-1], []
    for k in range(len(costs) - 1, -1, -1):
        G = torch.lerp(values[k + 1], G, keep[k].item()) - costs[k]
        targets.append(G)
    return torch.stack(targets[::-1])


def critic_loss(value: Value, batch: Experience, critic: Critic) -> Tensor:
    """The share of this process in the loss of `critic` on a batch of trajectories, a scalar; see the top of this file."""
    lengths = batch.times.diff()
    if critic.loss == "orthogonality":
        return _orthogonality(value, batch)
    values = batch.values(value)
    keep = {
        "martingale": torch.ones_like(lengths),
        "td": torch.zeros_like(lengths),
        "td-lambda": torch.exp(-lengths / critic.trace),
    }[critic.loss]
    targets = returns(values.detach(), batch.costs[:, batch.own], keep)
    weights = (lengths / lengths.sum()).to(values)
    losses = (weights[:, None] * ((targets - values[:-1]) / value.scale).square()).sum(0)
    return (batch.counted * losses).sum() / len(batch.rewards) / 2


def _orthogonality(value: Value, batch: Experience) -> Tensor:
    """A scalar whose gradient is that of |m|^2 / 2 for the moment m = E sum_k dV/dtheta (V_{k+1} - V_k - cost_k), with the test
    functions dV/dtheta held fixed. The two factors of the square come from two halves of the batch, so it is unbiased."""
    half = len(batch.rewards) // 2
    if half == 0:
        raise InputError("critic.loss orthogonality needs at least two trajectories in a batch")
    order = torch.arange(2 * half, device=batch.rewards.device)
    one, other = batch.part(order[:half]), batch.part(order[half:])
    weights = [p for p in value.network.parameters() if p.requires_grad]

    values = one.values(value)
    increments = one.counted * (values.diff(dim=0) - one.costs[:, one.own]).detach() / value.scale
    moment = torch.autograd.grad((values[:-1] * increments).sum() / (half * value.scale), weights)
    processes.sum_up(moment)

    values = other.values(value)
    # dV/dtheta . m, forward, as the derivative in u of the backward product u . dV/dtheta . m
    u = torch.zeros_like(values, requires_grad=True)
    backward = torch.autograd.grad(values / value.scale, weights, u, create_graph=True)
    products = torch.stack([(g * m).sum() for g, m in zip(backward, moment, strict=True)])
    (along,) = torch.autograd.grad(products.sum(), u, retain_graph=True)
    product: Tensor = other.counted * along[:-1].detach() * (values.diff(dim=0) - other.costs[:, other.own])
    return product.sum() / (half * value.scale)


@phase("update")
def improve(
    value: Value,
    optimizer: torch.optim.Optimizer,
    batch: Experience,
    critic: Critic,
    generator: torch.Generator,
    step: int,
) -> float:
    """`critic.num_steps` optimizer steps on a batch, the same in all processes; returns the loss before them, 0 without steps.

    Raises NonFiniteError, in all processes, if the loss is not finite; the tuned weights are then as before.
    """
    size, losses = len(batch.rewards), []
    for _ in range(critic.num_steps):
        part = batch
        if critic.train_batch_size is not None and critic.train_batch_size < size:
            which = torch.randperm(size, generator=generator, device=generator.device)[: critic.train_batch_size]
            part = batch.part(which.to(batch.rewards.device))
        loss = critic_loss(value, part, critic)
        losses.append(finite(processes.total(loss.item(), loss.device), "the critic's loss", step))
        optimizer.zero_grad()
        loss.backward()
        processes.sum_gradients(value.network.parameters())
        optimizer.step()
    return losses[0] if losses else 0.0
