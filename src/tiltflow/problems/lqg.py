"""Linear-quadratic-Gaussian control of a diffusion: the method's own code against exact gradients and optima.

Two questions. Is the policy gradient of the method right? At the problem's (K, k), for every estimator, with the exact value
function of the chain, from many trajectories at once, against the exact gradient of that chain. Does training reach the
optimum? From the base, with a linear policy whose slope and intercept are polynomials of time, the critic being learned.
"""

# Mutation tests: test_lqg.py test_score_as_action.py

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tiltflow.control.objective import RunningReward
from tiltflow.errors import InputError
from tiltflow.evaluation import achieved_tilt
from tiltflow.evaluation.distances import distance_to_law
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.flows.flow import Flow
from tiltflow.laws import lqg as exact
from tiltflow.laws.gaussian_mixture import QuadraticReward
from tiltflow.laws.lqg import Solution, chain_optimum, control_error, evaluate_chain, evaluate_policy, optimum
from tiltflow.laws.lqg_fields import LinearPolicy, base_flow, draw_start, interpolant, reward_of, running_reward_of
from tiltflow.methods import Tilting
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.plugins import find
from tiltflow.problems import Check, Defaults, Exact, Findings, Table, Trained, Tree, to_law
from tiltflow.problems.verification.exact_base import tilt_reached, tilt_rows
from tiltflow.problems.verification.policy_gradients import check_gradients, gradients_table
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.method import Method

Count = Annotated[int, Field(ge=1)]
FAST = {"learning_rate": 2e-2}
TUNING: dict[str, Tree] = {
    "adjoint-matching": {},
    "score-as-action": {
        "estimator": "temporal-difference",  # its optimum is that of the chain; the closed form's is off by O(1 / N)
        "critic": {"network": {"name": "quadratic"}, **FAST},
    },
    "ddpo": {"clip_range": 0.2},
    "dpok": {"clip_range": 0.2},
    "draft": {"num_inference_steps": 40},
}
"""Of methods that can control the chain of the problem."""


@dataclass(frozen=True)
class ChainLaw:
    """The law of the optimal chain's last state.

    Args:
        dimension: of x, of independent and equal coordinates.
        beta: the price of a nat of path KL, in units of reward.
        steps: of the chain.
        solution: the optimal chain.
    """

    dimension: int
    beta: float
    steps: int
    solution: Solution

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact samples [count, dimension], float64."""
        noise = torch.randn(count, self.dimension, generator=generator, dtype=torch.float64)
        x: Tensor = self.solution.mean + self.solution.variance**0.5 * noise
        return x


class Lqg(exact.Lqg):
    """Linear-quadratic-Gaussian control of a diffusion: exact objective, gradient, value function and optimum."""

    num_inference_steps: Count = 40
    """Steps of the chain whose best control `tiltflow compare` measures against; with N, those of the method too."""
    degree: Annotated[int, Field(ge=0)] = 4
    """Degree of the polynomials of time that are the slope and the intercept of the policy."""
    evaluate_steps: tuple[Count, ...] = (5, 10, 50, 100)
    """Numbers of steps at which the trained policy is evaluated, exactly, beside the one it was trained at."""
    trajectories: Annotated[int, Field(ge=2)] = 40_000
    """Number of trajectories for the estimates of the gradient."""

    usual_method: ClassVar[str] = "score-as-action"
    groups: ClassVar[int] = 1
    letters: ClassVar[Mapping[str, Sequence[str]]] = {
        "lambda": ["method.beta"],
        **{key: ["problem.num_inference_steps", "method.num_inference_steps"] for key in ("N", "num_inference_steps")},
        "eta": ["problem.eta", "method.eta"],
    }

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """See `tiltflow.problems.Problem`."""
        own: dict[str, Any] = {"solver": "euler-maruyama"} if method in TUNING else {}
        own |= {"beta": 0.5} if method in TUNING and issubclass(find("methods", method), Tilting) else {}
        run = {"iterations": 400, "ema_decay": 0.98}
        return Defaults(TUNING.get(method, {}), own, run, FAST if method in TUNING else {})

    def base_flow(self) -> Flow:
        """The exact base."""
        return base_flow(self)

    def tuned_flow(self, seed: int) -> Flow:
        """The base plus a linear policy, zero at the start."""
        return Flow(LinearPolicy(self, self.degree), "epsilon", interpolant(self))

    def reward(self) -> QuadraticReward:
        """q x - Q x^2 / 2, summed over the coordinates."""
        return reward_of(self)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """X_0 on the linear path: [count, dimension]."""
        return draw_start(self, count, base_flow(self).noise_time, generator)

    def running_reward(self) -> RunningReward | None:
        """-R X^2 / 2 per unit of the diffusion's own time; None where R, `state_cost`, is 0."""
        return running_reward_of(self)

    @property
    def law_in_words(self) -> str:
        """See `tiltflow.problems.Comparable`."""
        cost = f" and a running reward -{self.state_cost:g} |x|^2 / 2" if self.state_cost else ""
        return f"the end of a chain of {self.num_inference_steps} steps under its best control at a price beta{cost}"

    @property
    def sampling(self) -> Sampling:
        """The chain of `num_inference_steps` steps."""
        return Sampling(solver="euler-maruyama", num_inference_steps=self.num_inference_steps, eta=self.eta)

    def base_sampler(self) -> Exact:
        """Exact samples of the end of the chain without control."""
        none = np.zeros(self.num_inference_steps)
        return self._chain(1.0, evaluate_chain(self, 1.0, none, none)).sample

    def tilted_sampler(self, beta: float) -> Exact:
        """Exact samples of the end of the chain under its best control at a price beta."""
        return self._chain(beta, chain_optimum(self, beta, self.num_inference_steps)).sample

    def _chain(self, beta: float, solution: Solution) -> ChainLaw:
        return ChainLaw(self.dimension, beta, self.num_inference_steps, solution)

    def admit(self, method: Method) -> None:
        """See `tiltflow.problems.Comparable`: a method that draws by the same chain, and can have the running reward."""
        self._allow_running(method)
        own, wanted = (
            ", ".join(f"{key} {getattr(each, key)}" for key in ("solver", "num_inference_steps", "eta"))
            for each in (method.sampling, self.sampling)
        )
        if own != wanted:
            raise InputError(
                f"lqg: its law is that of one chain ({wanted}), and method {method.name!r} draws by another ({own})"
            )

    def _allow_running(self, method: Method) -> None:
        """Raise InputError for a method that cannot have the running reward."""
        if self.state_cost and not method.needs.running_reward:
            raise InputError(
                f"lqg: state_cost is a running reward, and method {method.name!r} rewards the ends of paths alone; use"
                " adjoint-matching or score-as-action, or state_cost = 0"
            )

    def exact_law(self, method: Method, iterations: int) -> ChainLaw:
        """The law of the chain's optimum. Raises InputError if the method's sampler has other noise than the problem's, and for
        methods that control no sampler at a price, or cannot have the running reward."""
        if not isinstance(method, Tilting):
            raise InputError(
                f"verify lqg is for methods that control a sampler at a price beta, {method.name} does not; use two-modes"
            )
        self._allow_running(method)
        if method.sampling.eta != self.eta:
            raise InputError("verify lqg: problem.eta and method.eta are the noise of one sampler: they must be the same")
        beta, steps = method.target(iterations, self.base_flow().noise_time).beta, method.sampling.num_inference_steps
        if beta is None:
            raise InputError(f"verify lqg: {method.name} has no price beta of its control")
        return ChainLaw(self.dimension, beta, steps, chain_optimum(self, beta, steps))

    def check(self, trained: Trained[ChainLaw]) -> Findings:
        """Measure the trained policy against the optimum of its chain and, for Score as Action, the estimates of the gradient
        against the exact one."""
        method, best = trained.method, trained.law.solution
        beta, steps = trained.law.beta, trained.law.steps
        policy = policy_at(trained.tuned, steps)
        found = evaluate_chain(self, beta, *policy)
        values: dict[str, Any] = {
            **self._distances(trained),
            "reward_exact": self.dimension * (self.q * best.mean - self.Q * (best.mean**2 + best.variance) / 2),
            "control_error": control_error(self, best, *policy),
            "objective": found.objective,
            "objective_exact": best.objective,
            "objective_base": evaluate_chain(self, beta, np.zeros(steps), np.zeros(steps)).objective,
            "objective_continuous": optimum(self, beta).objective,
            "path_kl": found.path_kl,
            "path_kl_exact": best.path_kl,
            "at_other_steps": self._at_other_steps(trained),
            "policy": self._exact_policy(beta, steps),
            "optimum": self._exact_optimum(beta),
        }
        gradients = (
            check_gradients(self, method, self.trajectories, trained.seed) if isinstance(method, ScoreAsAction) else None
        )
        values["gradients"] = None if gradients is None else {name: row.values() for name, row in gradients.items()}
        tables = [policy_table(values["policy"]), optimum_table(values)]
        if gradients is not None:
            tables.append(gradients_table(gradients))
        tables += [steps_table(values["at_other_steps"], steps), self._reached(trained, values)]
        return Findings(values, tables)

    def _distances(self, trained: Trained[ChainLaw]) -> dict[str, Any]:
        """Sliced W2 of samples to the law of the chain's optimum, the mean reward and the achieved tilt."""
        start, generator = trained.base.noise_time, stream(trained.seed, "evaluation")
        steps = trained.law.steps
        sampling = Sampling(solver="euler-maruyama", num_inference_steps=steps, eta=self.eta)
        x0 = draw_start(self, trained.num_samples, start, generator)
        x = sample(trained.tuned, x0, sampling, generator, start=start)
        x_base = sample(trained.base, x0, sampling, generator, start=start)
        law, before = (
            distance_to_law(
                y,
                trained.law.sample,
                stream(trained.seed, "exact"),
                directions=stream(trained.seed, "directions"),
                draws=trained.draws,
            )
            for y in (x, x_base)
        )
        best, (mean, variance) = optimum(self, trained.law.beta), self.tilted(trained.law.beta)
        reward, beta = mean_estimate(self.reward()(x)), trained.law.beta
        return {
            "distance": law.distance,
            "floor": law.floor,
            "floor_std": law.floor_std,
            "distance_base": before.distance,
            "initial_value_bias": float(
                ((best.mean - mean) ** 2 + (best.variance**0.5 - variance**0.5) ** 2) ** 0.5 * self.dimension**0.5
            ),
            "reward": reward.value,
            "reward_error": reward.standard_error,
            **tilt_reached(trained, x, x_base, sampling, self.reward(), lambda rewards: rewards / beta),
            **(dict.fromkeys(achieved_tilt.KEYS) if self.state_cost else {}),  # the law is not the base tilted by r
        }

    def _at_other_steps(self, trained: Trained[ChainLaw]) -> dict[str, dict[str, float]]:
        """The objective of the trained policy, and the optimum, of chains of other numbers of steps."""
        beta, steps = trained.law.beta, trained.law.steps
        return {
            str(n): {
                "objective": evaluate_chain(self, beta, *policy_at(trained.tuned, n)).objective,
                "optimum": chain_optimum(self, beta, n).objective,
            }
            for n in sorted({*self.evaluate_steps, steps})
        }

    def _exact_policy(self, beta: float, steps: int) -> dict[str, Any]:
        """All that is known exactly of the policy (K, k)."""
        continuous = evaluate_policy(self, beta)
        chain = evaluate_chain(self, beta, np.full(steps, self.K), np.full(steps, self.k))
        return {
            "K": self.K,
            "k": self.k,
            "objective": continuous.objective,
            "gradient": list(continuous.gradient),
            "value": dict(zip("Ppc", map(float, continuous.value(0.0)), strict=True)),
            "terminal_mean": continuous.mean,
            "terminal_variance": continuous.variance,
            "num_inference_steps": steps,
            "objective_of_chain": chain.objective,
            "gradient_of_chain": list(chain.gradient),
        }

    def _exact_optimum(self, beta: float) -> dict[str, Any]:
        """All that is known exactly of the optimal policy, in continuous time."""
        best, (mean, variance) = optimum(self, beta), self.tilted(beta)
        return {
            "value": dict(zip("Ppc", map(float, best.value(0.0)), strict=True)),
            "K": float(best.policy(0.0)[0]),
            "k": float(best.policy(0.0)[1]),
            "terminal_mean": best.mean,
            "terminal_variance": best.variance,
            "path_kl": best.path_kl,
            "tilted_mean": mean,
            "tilted_variance": variance,
        }

    def _reached(self, trained: Trained[ChainLaw], values: dict[str, Any]) -> Table:
        """The distance to the law of the optimum, and what else can be compared with exact values."""
        rows: dict[str, Check | str] = {
            "sliced W2 to the exact target": to_law(values["distance"], values["floor"]),
            "floor": Check(values["floor"], values["floor_std"]),
            "untuned base": Check(values["distance_base"]),
            "mean reward": Check(values["reward"], values["reward_error"], values["reward_exact"]),
            "relative error of the control": Check(values["control_error"], format=".1%"),
            "path KL": Check(values["path_kl"], theory=values["path_kl_exact"]),
            **({} if self.state_cost else tilt_rows(values)),
            "cost": trained.cost,
        }
        return Table(f"{trained.method.name} on {self.name}", rows)


def policy_table(policy: Mapping[str, Any]) -> Table:
    """The exact numbers of the policy (K, k)."""
    rows = {
        "J, continuous": f"{policy['objective']:.10f}",
        "dJ/dK, dJ/dk": numbers(policy["gradient"]),
        "P, p, c at the start": numbers(policy["value"].values()),
        "terminal mean, variance": numbers([policy["terminal_mean"], policy["terminal_variance"]]),
        f"J, chain of {policy['num_inference_steps']} steps": f"{policy['objective_of_chain']:.10f}",
        "dJ/dK, dJ/dk of the chain": numbers(policy["gradient_of_chain"]),
    }
    return Table(f"exact, u = {policy['K']:g} x {policy['k']:+g}", rows)


def optimum_table(values: Mapping[str, Any]) -> Table:
    """The exact numbers of the optimal policy."""
    best = values["optimum"]
    rows = {
        "J, continuous": f"{values['objective_continuous']:.10f}",
        "J, chain": f"{values['objective_exact']:.10f}",
        "K, k at the start": numbers([best["K"], best["k"]]),
        "P, p, c at the start": numbers(best["value"].values()),
        "terminal mean, variance": numbers([best["terminal_mean"], best["terminal_variance"]]),
        "of the tilted law": numbers([best["tilted_mean"], best["tilted_variance"]])
        + f"   (the optimum is {values['initial_value_bias']:.4f} from it in W2)",
        "path KL": f"{best['path_kl']:.6f}",
    }
    return Table("exact, the optimum", rows)


def steps_table(at: Mapping[str, Mapping[str, float]], steps: int) -> Table:
    """The objective at other numbers of steps, and how far it is below its optimum."""
    rows: dict[str, Check | str] = {}
    for n, found in at.items():
        best = found["optimum"]
        shortfall = (best - found["objective"]) / abs(best)
        note = f"optimum {best:.5f}; short by {shortfall:.2%}"
        rows[f"{n} steps"] = Check(found["objective"], note=note, format=".5f")
    return Table(f"J of the policy trained at {steps} steps, evaluated at", rows)


def numbers(values: Iterable[float]) -> str:
    """Numbers in a row, to six decimals."""
    return ", ".join(f"{value:.6f}" for value in values)


def policy_at(flow: Flow, steps: int) -> tuple[Any, Any]:
    """K and k of a tuned flow's policy at the times of a chain of so many steps: [steps] each, float64."""
    policy = flow.network
    assert isinstance(policy, LinearPolicy)
    with torch.no_grad():
        K, k = policy.at(torch.arange(steps).to(policy.coefficients) / steps).double().numpy()
    return K, k
