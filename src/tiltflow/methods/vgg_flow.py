r"""VGG-Flow: control of the sampler's ODE by a gradient of the value that is predicted, and not carried back (value-gradient
guidance for flows, arXiv 2512.05116).

The problem is that of `deterministic-adjoint-matching`: x' = v_base + u with the most E[ r(x_1) ] - beta / 2 integral |u|^2,
and u = -g / beta at its solution, g the gradient of the cost that is still to come. Here

    g_k(x) = - t_k^2 grad r(x + (1 - t_k) v(x, t_k)) + nu(x, t_k),

the gradient of the reward at the sample that the model predicts, and a network nu for what that lacks. Along paths of Euler's
method, held fixed,

    velocities   sum_k h_k | v(x_k, t_k) - v_base(x_k, t_k) + g_k / beta |^2
    nu           sum_k h_k | g_k - g'_k |^2,   g'_k = (1 + h J_base(x_{k+1}, t_{k+1}))^T g_{k+1},   -grad r(x_K) at the last,

g'_k held fixed (what temporal differences are to values). That is the published consistency, d g / dt + (grad v_base)^T g = 0
along the controlled path, with the derivative taken over the steps that were walked: so that at any number of steps g is the
adjoint where both vanish, and the end is a target, where the published loss has a penalty on nu there. Without its network
(`value_network: false`) it is guidance to first order.

The law is no tilt of the base: see `deterministic-adjoint-matching`.
"""

# Mutation tests: test_vgg_flow.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.errors import InputError
from tiltflow.flows.interpolant import expand
from tiltflow.flows.linearize import linearize
from tiltflow.laws.adjoint_laws import deterministic_control
from tiltflow.laws.law import Law
from tiltflow.laws.target import RewardAt, Target, exponential_tilt
from tiltflow.methods import Positive, Tilting
from tiltflow.optimization import finite, load_optimizer
from tiltflow.plugins import find, part_of
from tiltflow.rewards.functions.checked import finite_only, value_and_gradient
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import Trajectory
from tiltflow.samplers.sampling import Sampling
from tiltflow.samplers.stored import Stored
from tiltflow.settings import Settings
from tiltflow.streams import Buildable, new_network, stream
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs


@dataclass
class State:
    """nu, in units of the gradients of the first batch, and its optimizer; neither without a network."""

    network: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    scale: float | None = None

    def nu(self, x: Tensor, t: Tensor) -> Tensor:
        """nu(x, t) [batch, *event], for t [] or [batch]."""
        if self.network is None:
            return torch.zeros_like(x)
        own = next(self.network.parameters()).dtype
        found: Tensor = self.network(x.to(own), t.to(x.device, own).expand(len(x)))
        return (self.scale or 1.0) * found.to(x.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        if self.network is None or self.optimizer is None:
            return {}
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        if self.network is not None and self.optimizer is not None:
            self.network.load_state_dict(state["network"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.scale = state["scale"]


class VggFlow(Tilting):
    """VGG-Flow. Needs a differentiable reward; aims at the best transport of the samples, not at a tilt of the base."""

    name: Literal["vgg-flow"] = "vgg-flow"
    beta: Positive = 1e-3
    """Price of the transport, in units of reward: one over the published scale of the reward."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 20
    """Steps of Euler's method, from noise to data."""
    shift: Positive = 1.0
    """Above 1, more steps are near the noise; see `time_grid`."""
    value_network: bool = True
    """Whether there is a network for what the reward's gradient at predicted samples lacks. Without it there is no
    vector-Jacobian product of the base either."""
    network: Annotated[Any, BeforeValidator(part_of("networks"))] | None = None
    """nu: (x [batch, *event], time [batch]) -> [batch, *event]. By default a perceptron for vectors, a U-Net for images."""
    value_learning_rate: Positive = 1e-3
    """Learning rate of its own Adam."""

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published settings."""
        return {
            "learning_rate": 1e-4,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_weight_decay": 1e-4,
            "max_grad_norm": 1.0,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
        }

    @property
    def sampling(self) -> Sampling:
        """The sampler that is controlled."""
        return Sampling(solver="euler", num_inference_steps=self.num_inference_steps, shift=self.shift)

    @property
    def needs(self) -> Needs:
        """The gradient of the reward; a network that knows the condition, where several are tuned."""
        return Needs(
            reward_gradient=True,
            trajectory_copies=2 + self.value_network,
            critic_of_condition="method.value_network" if self.value_network else None,
            without_critic="value_network: false",
        )

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The law of the best transport."""
        caveats = [
            "The control of an ODE is a transport of the samples: their law is no tilt of the base at any temperature. It is"
            " narrower or further off than the tilt, and modes that are apart keep their weights."
        ]
        if not self.value_network:
            caveats.append(
                "The reward's gradient at predicted samples is not that of the value: the transport is near the best one at"
                " most."
            )
        return replace(
            exponential_tilt(self.beta, caveats, reaches="none"),
            words="the transport with the most E r - beta / 2 (its energy)" + (", nearly" if not self.value_network else ""),
            temperature=None,
            exact=self._exact_law,
        )

    def _exact_law(self, base: Law, reward: RewardAt) -> Law:
        """The law of the best transport. Raises ValueError without a network, where it is another one."""
        if not self.value_network:
            raise ValueError("the law of vgg-flow without a value network is not known")
        return deterministic_control(base, reward, self.beta)

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """nu, untrained. Raises InputError if no network fits the samples."""
        if not self.value_network:
            return State()
        settings = self.network or default_network(event_shape)
        network = new_network(cast(Buildable, settings), stream(seed, "value gradient").initial_seed()).to(device)
        return State(network, torch.optim.Adam(network.parameters(), lr=self.value_learning_rate))

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: one optimizer step, its gradient accumulated. nu takes its own before."""
        chain, count = self.sampling.chain(batch.start), len(batch)
        path = batch.own_paths(chain, to_the_end=True)
        states, targets = path.states, path.velocities  # whose place they take
        wanted = batch.storage.new(len(targets) if self.value_network else 0, batch.x[batch.own])  # of nu

        def aim(some: Batch, part: slice) -> tuple[Tensor]:
            own = batch.own_part(part)
            return (self._aim(some, state, path.moved(lambda values: values.of(own)), wanted.of(own)),)

        (rewards,) = batch.map(aim)
        if (kept := finite_only(rewards)) is not None:
            rewards = rewards[kept]
        batch.own_finite(targets, "velocity that is aimed at", chain.times)
        counted = batch.counted(kept)
        step, which = torch.meshgrid(torch.arange(len(targets)), torch.arange(len(counted)), indexing="ij")
        step, which = (each.flatten().to(batch.x.device) for each in (step, which))
        used, tuned = counted[which], batch.tuned.select(batch.own)

        def misfit(found: Tensor, aims: Stored, part: Tensor) -> Tensor:
            h = chain.v_scale.to(found.device)[step[part]]
            away = found - aims.at(step[part], which[part])
            return (expand(h, found) * away.square()).flatten(1).sum(1)

        def of_nu(part: Tensor) -> dict[str, Tensor]:
            k, i = step[part], which[part]
            t = chain.times.to(batch.x.device)[k]
            return {"loss": misfit(state.nu(states.at(k, i), t), wanted, part) / (state.scale or 1.0) ** 2}

        def of_velocities(part: Tensor) -> dict[str, Tensor]:
            k, i = step[part], which[part]
            t = chain.times.to(batch.x.device)[k]
            return {"loss": misfit(tuned.select(i)(states.at(k, i), t), targets, part)}

        measured = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            **({} if kept is None else {"dropped": float(count - len(kept))}),
        }
        if state.network is not None and state.optimizer is not None:
            state.scale = state.scale or self._size(wanted, chain.times[-2].item(), counted, len(rewards))
            state.optimizer.zero_grad()
            loss = batch.accumulate_own(of_nu, used, over=len(rewards))["loss"]
            measured["critic_loss"] = finite(loss, "the loss of the value network", batch.step)
            processes.sum_gradients(state.network.parameters())
            state.optimizer.step()
        yield measured | batch.accumulate_own(of_velocities, used, over=len(rewards))

    def _aim(self, batch: Batch, state: State, path: Trajectory, wanted: Stored) -> Tensor:
        """Write into the velocities of a path what they are to be, and into `wanted` what nu is to be. Returns the rewards of
        the ends [batch]."""
        chain, states, targets = path.chain, path.states, path.velocities
        rewards, later = torch.empty(0), torch.empty(0)
        for k in range(len(chain) - 1, -1, -1):
            x, t = states[k], chain.times[k]
            predicted = x + (1 - t.item()) * path.drawn_by[k]  # that of the last step is the end
            found, slope = value_and_gradient(batch.reward, predicted, batch.non_finite)
            prior = -(t.item() ** 2) * slope
            with torch.no_grad():
                g = prior + state.nu(x, t)
            if not self.value_network:
                with torch.no_grad():
                    targets[k] = batch.base(x, t) - g / self.beta
            else:
                last = k == len(chain) - 1
                wanted[k] = (-slope if last else later) - prior
                v, pullback = linearize(batch.base, x, t)
                targets[k] = v - g / self.beta
                if k:
                    later = g + pullback(chain.v_scale[k].item() * g.to(v))
            rewards = found if not len(rewards) else rewards
        return rewards

    @staticmethod
    def _size(wanted: Stored, last_time: float, counted: Tensor, count: int) -> float:
        """The root mean square of the reward's gradient at the ends, of which nu is to be the part 1 - t^2 at the last step; 1
        where it is 0."""
        last = wanted[len(wanted) - 1] / (1 - last_time**2)
        total = processes.total((counted * last.flatten(1).square().mean(1)).sum().item(), last.device)
        return (total / count) ** 0.5 or 1.0


def default_network(event_shape: tuple[int, ...]) -> Settings:
    """A network nu for samples of this shape. Raises InputError if there is none."""
    network: Settings
    match event_shape:
        case (dimension,):
            network = find("networks", "mlp")(dimension=dimension)
        case (channels, height, width) if height % 4 == 0 and width % 4 == 0:
            network = find("networks", "unet")(image_channels=channels)
        case _:
            raise InputError(
                f"method.network: there is no default for samples of shape {list(event_shape)}; give one, or value_network:"
                " false"
            )
    return network
