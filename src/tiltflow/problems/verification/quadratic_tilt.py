"""Settings that problems with a Gaussian mixture as base and a quadratic reward share: the tilted law is a mixture again."""

# Mutation tests: test_chain_optimum.py test_verify.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.distances import DistanceToLaw, distances_to_law, exact_w2
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.flows.flow import Flow
from tiltflow.laws import chain_optimum
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward, Vector, optimal_control, span_of_tilt, vector
from tiltflow.methods import Tilting
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.path_reweighted import PathReweighted
from tiltflow.problems import Check, Defaults, Findings, Table, Trained, to_law
from tiltflow.problems.verification.exact_base import ExactBase, tilt_reached, tilt_rows
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.method import Method

# ORW-CFM-W2 learns in rounds, each from many samples: without a penalty four of them, whose law is p exp(r). A round must be
# fitted well there, as nothing pulls the law back.
ROUNDS = {"alpha": 0, "tau": 0.25, "num_passes": 800, "regression_batch_size": 4096}
RUN_OF_ROUNDS = {"iterations": 3200, "train_batch_size": 32_768, "ema_decay": 0.99}


class QuadraticTilt(ExactBase):
    """Part of the settings of every problem whose base is a Gaussian mixture and whose reward is quadratic."""

    dimension: Annotated[int, Field(ge=1)] = 2
    """Dimension of x."""
    linear: Vector = 0.0
    """c of the reward c.x - q |x|^2 / 2: one number for all coordinates, or a list whose missing numbers are 0."""
    quadratic: Annotated[float, Field(ge=0)] = 0.0
    """q of the reward."""
    num_samples_w2: Annotated[int, Field(ge=100)] = 2_000
    """Points for the exact Wasserstein distance, whose cost grows with their square."""

    @model_validator(mode="after")
    def _check_linear(self) -> QuadraticTilt:
        self._check_length("linear", self.linear)
        return self

    def _check_length(self, name: str, value: Vector) -> None:
        """Raises ValueError if a vector has more numbers than x."""
        if isinstance(value, tuple) and len(value) > self.dimension:
            unset = name not in self.model_fields_set
            size, end = f"{len(value)} numbers" + " by default" * unset, f"; set {name} too" * unset
            raise ValueError(f"{name} has {size}, dimension is {self.dimension}{end}")

    def reward(self) -> QuadraticReward:
        """c.x - q |x|^2 / 2."""
        return QuadraticReward(vector(self.linear, self.dimension), self.quadratic)

    def tilted_sampler(self, beta: float) -> Callable[[int, torch.Generator], Tensor]:
        """See `ExactBase`."""
        return self.base().tilt(self.reward(), beta).sample

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """See `tiltflow.problems.Problem`."""
        suited = super().defaults(method)
        return replace(suited, method=ROUNDS, run=RUN_OF_ROUNDS) if method == "orw-cfm-w2" else suited

    def exact_law(self, method: Method, iterations: int) -> GaussianMixture:
        """p_base exp(r / beta). Raises InputError where the method aims at another law."""
        return self.base().tilt(self.reward(), temperature(method, iterations))

    def check(self, trained: Trained[GaussianMixture]) -> Findings:
        """Measure the distances to the exact law, and the control.

        Distances are 2-Wasserstein, in units of x, between samples of the memoryless SDE (or the solver asked for) and as many
        exact samples; `floor` is the same between two exact samples. `distance` is over random directions of the space, in
        which many dimensions hide a tilt; `distance_span` over those of the `span` dimensions in which the tilt moves anything
        but variances. Those with `ode` are of Heun's method in as many steps; `own_steps` has them for the number of steps that
        the method itself takes.
        """
        law, reward, target = self.base(), self.reward(), trained.law
        beta = temperature(trained.method, trained.iterations)
        generator = stream(trained.seed, "evaluation")
        x, x_base, x_ode = self._samples(trained, generator)
        own_steps = trained.method.sampling.num_inference_steps
        x_own, x_own_ode = x, x_ode
        if own_steps != self.sampling.num_inference_steps:
            own = self.sampling.model_copy(update={"num_inference_steps": own_steps})
            x_own, x_own_ode = self._sampled(trained, own, stream(trained.seed, "evaluation", "own steps"))

        def measure(*several: Tensor, law: GaussianMixture = target, **options: Any) -> list[DistanceToLaw]:
            options = {"draws": trained.draws, "directions": stream(trained.seed, "directions"), **options}
            return distances_to_law(several, law.sample, stream(trained.seed, "exact"), **options)

        sliced, of_base, of_ode = measure(x, x_base, x_ode)
        (w2,) = measure(x[: self.num_samples_w2], distance=exact_w2, draws=min(trained.draws, 3))
        span = span_of_tilt(law, target, reward)
        within = [some.double() @ span for some in (x, x_ode, x_own, x_own_ode)]
        spanned, spanned_ode, of_own, of_own_ode = measure(*within, law=target.projected(span))
        mean = mean_estimate(reward(x))
        values: dict[str, Any] = {
            "distance": sliced.distance,
            "floor": sliced.floor,
            "floor_std": sliced.floor_std,
            "distance_base": of_base.distance,
            "distance_ode": of_ode.distance,
            "distance_span": spanned.distance,
            "distance_ode_span": spanned_ode.distance,
            "own_steps": {
                "num_inference_steps": own_steps,
                "distance_span": of_own.distance,
                "distance_ode_span": of_own_ode.distance,
            },
            "floor_span": spanned.floor,
            "floor_span_std": spanned.floor_std,
            "span": span.shape[1],
            "dimension": law.means.shape[1],
            "w2": w2.distance,
            "w2_floor": w2.floor,
            "reward": mean.value,
            "reward_error": mean.standard_error,
            "reward_exact": target.expectation(reward),
            "reward_base": law.expectation(reward),
            **tilt_reached(trained, x, x_base, self.sampling, reward, lambda rewards: rewards / beta),
            **best_of_chain(trained.method, law, reward, beta),
            "control_error": control_error(trained.tuned, law, target, generator),
            "loss": trained.record.metrics["loss"],
            "path_kl": trained.record.metrics.get("path_kl"),
            "inverse_temperature": trained.record.metrics.get("inverse_temperature"),
            "path_kl_exact": target.expectation(reward) / beta - law.log_partition(reward, beta),
        }
        return Findings(values, [self._reached(trained, values)])

    def _reached(self, trained: Trained[GaussianMixture], values: dict[str, Any]) -> Table:
        """The distances to the exact law, and what else can be compared with exact values."""
        span, kl, own = values["span"], values["path_kl"], values["own_steps"]
        eta, beta = values["inverse_temperature"], temperature(trained.method, trained.iterations)
        rows: dict[str, Check | str] = {
            "sliced W2 to the exact target": to_law(values["distance"], values["floor"]),
            "floor": Check(values["floor"], values["floor_std"]),
        }
        if span < values["dimension"]:
            where = "one dimension" if span == 1 else f"{span} dimensions"
            rows[f"within the {where} of the tilt"] = to_law(values["distance_span"], values["floor_span"], "its floor")
            rows["so by the ODE"] = to_law(values["distance_ode_span"], values["floor_span"], "its floor")
        if own["num_inference_steps"] != self.sampling.num_inference_steps:
            there = " within the tilt" if span < values["dimension"] else ""
            rows |= {
                f"{how} in {own['num_inference_steps']} steps{there}": to_law(own[key], values["floor_span"], "its floor")
                for how, key in (("by the SDE", "distance_span"), ("by the ODE", "distance_ode_span"))
            }
        rows |= {
            "best that this chain can reach": words_of_chain(values),
            "untuned base": Check(values["distance_base"]),
            "sampled by the ODE": to_law(values["distance_ode"], values["floor"]),
            "exact W2": Check(values["w2"], note=f"floor {values['w2_floor']:.4f}"),
            "mean reward": Check(values["reward"], values["reward_error"], values["reward_exact"]),
            "relative error of the control": Check(values["control_error"], format=".1%"),
            **({"path KL": Check(kl, theory=values["path_kl_exact"])} if kl is not None else {}),
            **({"inverse temperature at the end": Check(eta, theory=1 / beta)} if eta is not None else {}),
            **tilt_rows(values),
            "cost": trained.cost,
        }
        return Table(f"{trained.method.name} on {self.name}", rows)

    def _samples(self, trained: Trained[GaussianMixture], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of the tuned flow, of the base, and of the tuned flow's ODE, all from the same noise."""
        noise = self.draw(trained.num_samples, generator)
        x_base = sample(trained.base, noise, self.sampling, generator)
        x = sample(trained.tuned, noise, self.sampling, generator)
        return x, x_base, sample(trained.tuned, noise, ode_of(self.sampling), generator)

    def _sampled(
        self, trained: Trained[GaussianMixture], sampling: Sampling, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Samples of the tuned flow by `sampling`, and by the ODE in as many steps, from the same noise."""
        noise = self.draw(trained.num_samples, generator)
        x = sample(trained.tuned, noise, sampling, generator)
        return x, sample(trained.tuned, noise, ode_of(sampling), generator)


def ode_of(sampling: Sampling) -> Sampling:
    """Heun's method in as many steps."""
    return Sampling(solver="heun", num_inference_steps=sampling.num_inference_steps)


def temperature(method: Method, iterations: int) -> float:
    """The beta of the tilted law that a method aims at after so many optimizer steps. Raises InputError where its law is not
    a tilted one."""
    found = method.target(iterations).temperature
    if found is None and isinstance(method, OrwCfmW2):
        raise InputError(
            f"on this problem the law of {method.name} is known for alpha = 0, online_fraction = 1 and exponential weights"
            f" only; `tiltflow verify two-modes --method {method.name}` knows them all"
        )
    if found is None:
        raise InputError(f"no law of {method.name} is known on this problem")
    return found


def best_of_chain(method: Method, law: GaussianMixture, reward: QuadraticReward, beta: float) -> dict[str, Any]:
    """`chain_optimum`: what the best control of the method's own chain reaches, or what weights of its paths stand for, so that
    a run that has not converged is told from a chain that cannot come closer. None, with the reason, where it is not computed.

    `distance` is W2 to the tilted law in one dimension, sliced W2 in two; it has no Monte-Carlo floor.
    """
    try:
        if isinstance(method, PathReweighted):
            chain = method.chain()
            best = chain_optimum.tilted_chain(chain, law, reward, beta)
        elif isinstance(method, Tilting) and (priced := method.priced_chain()) is not None:
            chain = priced[0]
            best = chain_optimum.solve(*priced, law, reward, beta)
        else:
            return {"chain_optimum": None, "chain_optimum_missing": "the method does not control a chain at a price"}
    except InputError as error:
        return {"chain_optimum": None, "chain_optimum_missing": str(error)}
    found = {
        "distance": best.sliced_w2(law.tilt(reward, beta)),
        "reward": best.reward,
        "path_kl": best.path_kl,
        "num_inference_steps": len(chain),
    }
    return {"chain_optimum": found, "chain_optimum_missing": None}


@torch.no_grad()
def control_error(tuned: Flow, law: GaussianMixture, target: GaussianMixture, generator: torch.Generator) -> float:
    """Relative error of the learned control, sqrt(E|u - u*|^2 / E|u*|^2), over the exact tilted process at 39 times.

    The tilted process is memoryless, so x_t = t x_1 + (1 - t) x_0 with x_1 from the target and x_0 fresh noise is exact.
    Absolute, not relative, where the optimal control is zero.
    """
    wrong, right = 0.0, 0.0
    for t in time_grid(40)[1:-1]:
        x1 = target.sample(2000, generator)
        x = (t * x1 + (1 - t) * torch.randn(x1.shape, generator=generator, dtype=torch.float64)).float()
        best = optimal_control(law, target, x, t)
        learned = 2 / (2 * (1 - t) / t).sqrt().item() * (tuned(x, t) - law.velocity(x, t))
        wrong += (learned - best).square().sum().item()
        right += best.square().sum().item()
    return float((wrong / right) ** 0.5) if right > 0 else float((wrong / (39 * 2000)) ** 0.5)


def words_of_chain(found: dict[str, Any]) -> str:
    """What `best_of_chain` found, or why it is not known."""
    best = found["chain_optimum"]
    if best is None:
        return str(found["chain_optimum_missing"])
    return f"{best['distance']:.4f}, mean reward {best['reward']:.4f}   (exact, {best['num_inference_steps']} steps)"
