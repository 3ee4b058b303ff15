"""Steered samples against the laws that they are said to have, by z-tests, and what a user can get wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lines import NORMAL, TWO_MODES
from torch import Tensor, nn
from typer.testing import CliRunner

import tiltflow
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import ExactVelocity, GaussianMixture, QuadraticReward, mixture
from tiltflow.laws.law import Law
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.steering.drawing.resampling import effective_sample_size, systematic, without_replacement
from tiltflow.steering.drawing.source import Source
from tiltflow.steering.gradient_guidance import pushed
from tiltflow.streams import stream

ONE_STEP = Sampling(solver="euler", num_inference_steps=1)


class ByQuantiles(nn.Module):
    """The velocity by which one step of Euler's method maps standard normal noise to a law on the line: by a table."""

    def __init__(self, law: Law) -> None:
        super().__init__()
        noise = torch.linspace(-6, 6, 2401, dtype=torch.float64)
        levels = (0.5 * (1 + torch.erf(noise / math.sqrt(2)))).clamp(1e-9, 1 - 1e-9)
        self.quantiles, self.spacing = torch.from_numpy(law.quantiles(levels.numpy())), 0.005
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        place = ((x.double() + 6) / self.spacing).clamp(0, len(self.quantiles) - 1.001)
        left = place.long()
        found = torch.lerp(self.quantiles[left], self.quantiles[left + 1], place - left)
        return (found - x).to(x) * self.scale


def on_the_line(law: Law = NORMAL, **options: Any) -> tiltflow.Model:
    return tiltflow.Model(Flow(ByQuantiles(law)), event_shape=(1,), sampling=ONE_STEP, **options)


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x[:, 0])


def z_of_mean(values: Tensor, mean: float) -> float:
    """How many standard errors the mean of independent values is from a number."""
    return abs(values.double().mean().item() - mean) / (values.double().std().item() / math.sqrt(len(values)))


@pytest.mark.parametrize("n", [2, 4])
def test_the_best_of_n_has_its_law(n: int) -> None:
    steering = tiltflow.BestOfN(n=n)
    found = tiltflow.steer(on_the_line(TWO_MODES), tanh, steering, 4000)
    exact = steering.law(4000).exact
    assert exact is not None
    law = exact(TWO_MODES, np.tanh)
    assert torch.equal(found.rewards, tanh(found.samples).double())
    assert z_of_mean(found.rewards, law.expectation(np.tanh)) < 3.5
    assert z_of_mean((found.samples[:, 0] > 0).float(), law.positive) < 3.5
    assert z_of_mean(found.samples[:, 0] ** 2, law.expectation(np.square)) < 3.5
    assert (found.network_evaluations, found.reward_evaluations) == (4000 * n, 4000 * n)
    assert f"{law.kl(TWO_MODES):.3f}" in found.law


def one_by_one(steering: Any, reward: Any, law: Law, num_samples: int, times: int) -> Any:
    """Independent draws of so few samples that the bias of a self-normalised mean is large."""
    names = tuple(map(str, range(times)))
    return tiltflow.steer(on_the_line(law, class_names=names), reward, steering, num_samples)


@pytest.mark.parametrize(("n", "num_samples"), [(2, 1), (2, 3)])
def test_importance_resampling_has_the_law_of_one_of_n(n: int, num_samples: int) -> None:
    """E tanh is .306 of one of 2, .543 of one of 6, and .617 under the tilt."""
    steering = tiltflow.ImportanceResampling(n=n)
    found = one_by_one(steering, tanh, TWO_MODES, num_samples, 600)
    exact = steering.law(num_samples).exact
    assert exact is not None
    law = exact(TWO_MODES, np.tanh)
    means = found.rewards.reshape(-1, num_samples).mean(1)
    assert z_of_mean(means, law.expectation(np.tanh)) < 3.5
    assert z_of_mean((found.samples[:, 0] > 0).float().reshape(-1, num_samples).mean(1), law.positive) < 3.5
    assert z_of_mean(means, TWO_MODES.tilt(np.tanh(TWO_MODES.points)).expectation(np.tanh)) > 2


def test_many_candidates_have_the_tilt_in_closed_form() -> None:
    """N(0, 1) under r = x at beta = 1/2: N(2, 1), log Z = 2, and of N candidates N e^-4 are effective."""
    found = tiltflow.steer(on_the_line(), lambda x: x[:, 0], tiltflow.ImportanceResampling(beta=0.5, n=200), 1000)
    error = 1 / math.sqrt(found.effective_sample_sizes[0])
    assert abs(found.samples.mean().item() - 2) < 4 * error
    assert abs(found.samples.var().item() - 1) < 8 * error
    assert found.log_normalisers[0] == pytest.approx(2, abs=4 * error)
    assert found.effective_sample_sizes[0] == pytest.approx(200_000 * math.exp(-4), rel=0.3)
    assert (found.temperature, found.notes) == (0.5, ())


def test_the_normaliser_is_unbiased() -> None:
    found = one_by_one(tiltflow.ImportanceResampling(n=4), lambda x: x[:, 0], NORMAL, 1, 600)
    assert z_of_mean(torch.tensor(found.log_normalisers).exp(), math.exp(0.5)) < 3.5


def test_without_replacement_all_samples_differ() -> None:
    steering = tiltflow.ImportanceResampling(n=2, beta=0.1, replacement=False)
    found = one_by_one(steering, tanh, TWO_MODES, 4, 50)
    for some in found.samples.reshape(50, 4):
        assert len(some.unique()) == 4
    with_copies = one_by_one(steering.model_copy(update={"replacement": True}), tanh, TWO_MODES, 4, 50)
    assert found.rewards.mean() < with_copies.rewards.mean()


def test_resampling_keeps_the_probabilities_of_the_weights() -> None:
    """Systematic resampling chooses floor or ceil of count w copies; without replacement, the first by w."""
    w = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).repeat(4000, 1)
    chosen = systematic(w.log(), 3, stream(0, "test"))
    counts = torch.nn.functional.one_hot(chosen, 4).sum(1)
    assert ((counts >= (3 * w).floor()) & (counts <= (3 * w).ceil())).all()
    for k in range(4):
        for place in range(3):
            assert z_of_mean((chosen[:, place] == k).float(), w[0, k].item()) < 3.8
    several = without_replacement(w.log(), 2, stream(0, "test"))
    assert z_of_mean((several[:, 0] == 1).float(), 0.3) < 3.5
    assert z_of_mean(((several == torch.tensor([0, 1])).all(1)).float(), 0.5 * 0.3 / 0.5) < 3.5
    assert effective_sample_size(w.log())[0] == pytest.approx(1 / (0.25 + 0.09 + 0.0225 + 0.0025))


def test_candidates_that_say_little_are_named() -> None:
    found = tiltflow.steer(on_the_line(), lambda x: x[:, 0], tiltflow.ImportanceResampling(beta=0.05, n=2), 50)
    (note,) = found.notes
    assert note.startswith(f"The 100 candidates are worth {found.effective_sample_sizes[0]:.1f} samples")


def source_of(law: GaussianMixture, reward: Any, steps: int, seed: int = 0) -> Source:
    model = tiltflow.Model(Flow(ExactVelocity(law)), event_shape=(1,), sampling=Sampling(num_inference_steps=steps))
    return Source(model, reward, None, model.sampling, 10**6, seed)


def drawn_by_chain(source: Source) -> GaussianMixture:
    """The law that a chain of Gaussian steps draws where the field is linear in x, v = a x + b, by the moments of each step."""
    chain, mean, variance = source.sampling.chain(), 0.0, 1.0
    for k in range(len(chain)):
        at = [source.model.flow(torch.full((1, 1), x, dtype=torch.float64), chain.times[k]).item() for x in (0.0, 1.0)]
        gain = chain.x_scale[k].item() + chain.v_scale[k].item() * (at[1] - at[0])
        mean = gain * mean + chain.v_scale[k].item() * at[0]
        variance = gain**2 * variance + chain.std[k].item() ** 2
    return mixture(torch.tensor([[mean]], dtype=torch.float64), (1.0,), math.sqrt(variance))


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_smc_is_unbiased_for_any_number_of_particles(potential: Any) -> None:
    """Three particles: the mean over systems of Z f(x), x chosen by the weights of its system, is E[exp(r / beta) f]."""
    reward, beta = QuadraticReward(torch.tensor([1.7], dtype=torch.float64), 3.0), 0.5
    source = source_of(mixture(torch.tensor([[0.7]], dtype=torch.float64), (1.0,), 0.5), reward, 6)
    base = drawn_by_chain(source)
    target, log_z = base.tilt(reward, beta), base.log_partition(reward, beta)
    steering = tiltflow.Smc(beta=beta, num_particles=3, potential=potential, every=1, resample_below=0.9)
    x, found = steering.population(source, 8000, 3)
    (chosen,) = systematic(found.log_weights, 1, stream(0, "test")).T
    values = x.reshape(8000, 3)[torch.arange(8000), chosen].double()
    z = (found.log_normalisers() - log_z).exp()
    mean, variance = target.means.item(), target.variances.item()
    assert z_of_mean(z, 1.0) < 3.5
    assert z_of_mean(z * values, mean) < 3.5
    assert z_of_mean(z * values**2, variance + mean**2) < 3.5
    assert (found.first != torch.arange(3)).any()
    assert source.reward_evaluations == 8000 * 3 * 5


def test_smc_has_the_tilt_of_two_modes() -> None:
    """E tanh is .617 under the tilt at beta = 1 and .896 at .3; the chain's own base is weighted for comparison."""
    base = mixture(torch.tensor([[-1.5], [1.5]], dtype=torch.float64), (1.0, 1.0), 0.5)
    model = source_of(base, tanh, 20).model
    plain = tiltflow.steer(model, tanh, tiltflow.ImportanceResampling(beta=0.3, n=2), 10_000, batch_size=20_000)
    found = [tiltflow.steer(model, tanh, tiltflow.Smc(beta=0.3), 2000, seed=seed, batch_size=2000) for seed in range(4)]
    rewards = torch.stack([each.rewards.mean() for each in found])
    assert abs(rewards.mean().item() - plain.rewards.mean().item()) < 4 * max(rewards.std().item() / 2, 0.003)
    assert rewards.mean().item() == pytest.approx(0.896, abs=0.02)
    logs = torch.tensor([each.log_normalisers[0] for each in found])
    assert logs.mean().item() == pytest.approx(plain.log_normalisers[0], abs=0.05)
    assert (found[0].network_evaluations, found[0].reward_evaluations) == (2000 * 20, 2000 * 4)
    again = tiltflow.steer(model, tanh, tiltflow.Smc(beta=0.3), 2000, batch_size=2000)
    assert torch.equal(again.samples, found[0].samples)


def test_the_effective_sample_size_is_that_of_the_normaliser() -> None:
    """particles / size - 1 is particles times the relative variance of the normaliser (Lee and Whiteley 2018)."""
    base = mixture(torch.tensor([[-1.5], [1.5]], dtype=torch.float64), (1.0, 1.0), 0.5)
    _, found = tiltflow.Smc(beta=0.5).population(source_of(base, tanh, 15), 400, 100)
    spread = found.log_normalisers().exp()
    relative = (spread.var() / spread.mean() ** 2).item()
    said = (1 / found.effective_sample_sizes() - 1 / 100).mean().item()
    assert said == pytest.approx(relative, rel=0.3)


@pytest.mark.parametrize(
    ("law", "reward", "settings", "exact"),
    [
        ((0.7, 0.5), (1.7, 3.0), {}, (0.621620, 0.118092)),
        ((0.7, 0.5), (1.7, 3.0), {"curvature": 3.0, "std": 0.5}, (0.642857, 0.142857)),
        ((0.0, 1.0), (0.0, 1.0), {}, (0.0, math.exp(-1))),
        ((0.0, 1.0), (0.0, 1.0), {"curvature": 1.0}, (0.0, 0.5)),
    ],
)
def test_guidance_of_a_gaussian_is_in_closed_form(law: Any, reward: Any, settings: Any, exact: Any) -> None:
    """The map of the ODE is affine: the mean is where 0 goes, the variance its slope squared; errors fall with the step."""
    slope, curvature = reward
    found = []
    for steps in (20, 80):
        base = mixture(torch.tensor([[law[0]]], dtype=torch.float64), (1.0,), law[1])
        quadratic = QuadraticReward(torch.tensor([slope], dtype=torch.float64), curvature)
        source = source_of(base, quadratic, steps)
        source.sampling = Sampling(solver="heun", num_inference_steps=steps)
        field = pushed(source, tiltflow.GradientGuidance(**settings), 2)
        x = sample(field, torch.tensor([[0.0], [1.0]], dtype=torch.float64), source.sampling, stream(0, "test"))[:, 0]
        found.append([x[0].item(), (x[1] - x[0]).item() ** 2])
    errors = torch.tensor(found) - torch.tensor(exact)
    assert errors[1].abs().max() < 2e-3
    assert errors[1].abs().max() < errors[0].abs().max() / 3


@pytest.mark.parametrize("settings", [{}, {"curvature": 1.0, "std": 0.5}])
def test_guidance_of_two_modes_has_its_law(settings: Any) -> None:
    base = mixture(torch.tensor([[-1.5], [1.5]], dtype=torch.float64), (1.0, 1.0), 0.5)
    steering = tiltflow.GradientGuidance(**settings)
    sampling = Sampling(solver="heun", num_inference_steps=40)
    found = tiltflow.steer(source_of(base, tanh, 1).model, tanh, steering, 2000, sampling=sampling, batch_size=2000)
    exact = steering.law(2000).exact
    assert exact is not None
    law = exact(TWO_MODES, np.tanh)
    assert z_of_mean(found.rewards, law.expectation(np.tanh)) < 3.5
    assert z_of_mean((found.samples[:, 0] > 0).float(), law.positive) < 3.5
    assert law.expectation(np.tanh) > 0.65  # that of the tilt is .617
    assert found.reward_evaluations == 2000 * 2 * 40  # its last step is one of Euler


def test_guidance_is_no_longer_than_it_may_be() -> None:
    source = source_of(mixture(torch.zeros(1, 1, dtype=torch.float64), (1.0,), 1.0), lambda x: 1e3 * x[:, 0], 4)
    x, t = torch.tensor([[0.3], [-1.0]], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    v = source.model.flow(x, t + 0.1)
    push = pushed(source, tiltflow.GradientGuidance(max_ratio=0.25), 2)(x, t + 0.1) - v
    assert torch.allclose(push, 0.25 * v.abs())


def test_equal_rewards_choose_nothing() -> None:
    found = tiltflow.steer(on_the_line(), lambda x: torch.zeros(len(x)), tiltflow.BestOfN(n=8), 4000)
    assert z_of_mean(found.samples[:, 0], 0.0) < 3.5
    assert z_of_mean(found.samples[:, 0] ** 2, 1.0) < 3.5


def test_each_class_is_steered_by_itself_and_a_seed_gives_the_same_samples() -> None:
    model = on_the_line(class_names=("low", "high"))

    def toward_the_class(x: Tensor, labels: Tensor) -> Tensor:
        return x[:, 0] * (2 * labels - 1)

    def draw(**options: Any) -> Any:
        return tiltflow.steer(model, toward_the_class, tiltflow.BestOfN(n=64), 50, **options)

    found = draw()
    assert found.conditions == ("low",) * 50 + ("high",) * 50
    assert found.samples[:50].max() < 0 < found.samples[50:].min()
    assert torch.equal(draw().samples, found.samples)
    assert not torch.equal(draw(seed=1).samples, found.samples)
    assert torch.equal(draw(conditions=["low"]).samples, found.samples[:50])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "digits-flow"}, "steer: model must be tiltflow.load('digits-flow'), is str"),
        ({"steering": tiltflow.BestOfN}, "such as BestOfN(n=4), is the class BestOfN"),
        ({"num_samples": 0}, "steer: num_samples must be an integer >= 1, is 0"),
        ({"guidance_scale": 2.0}, "steer: guidance_scale: only pipelines have one"),
        ({"conditions": ["a"]}, "steer: conditions: this model has none"),
        ({"reward": lambda x: x[:, 0] / 0}, "best-of-n: the reward is not finite for 8 of 8 samples"),
        ({"steering": tiltflow.Smc()}, "smc: solver euler has no noise of a chain's steps"),
        (
            {"steering": tiltflow.GradientGuidance(), "reward": lambda x: x[:, 0].sign().detach()},
            "gradient-guidance: the reward has no gradient with respect to the sample",
        ),
        ({"reward": lambda x: x}, "best-of-n: the reward must return one number per sample"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: dict[str, Any], message: str) -> None:
    given = {"model": on_the_line(), "reward": tanh, "steering": tiltflow.BestOfN(n=4), "num_samples": 2, **arguments}
    with pytest.raises(InputError) as error:
        tiltflow.steer(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_sample_is_no_choice() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        tiltflow.BestOfN(n=1)


def test_the_command_line_steers(tmp_path: Path) -> None:
    small = ["sample", "digits-flow", "-n", "1", "--num-inference-steps", "2", "-o", str(tmp_path / "x.npz")]
    done = CliRunner().invoke(app, [*small, "--json", "--steer", "{name: best-of-n, n: 3}", "--reward", "ink"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert (len(found["rewards"]), found["network_evaluations"], found["notes"]) == (1, 6, [])
    assert "F(r(x))^2" in found["law"]
    for wrong, message in (
        (["--steer", "best-of-n"], "--steer needs --reward too"),
        (["--reward", "ink"], "--reward needs --steer too"),
        (["--steer", "best-of", "--reward", "ink"], "there is no steering 'best-of', did you mean 'best-of-n'?"),
        (["--steer", "{name: best-of-n, n: 1}", "--reward", "ink"], "steer.n must be greater than or equal to 2 (got 1)"),
    ):
        failed = CliRunner().invoke(app, [*small, *wrong])
        assert isinstance(failed.exception, InputError)
        assert message in str(failed.exception)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steering", "networks", "rewards"),
    [
        (tiltflow.BestOfN(n=2), 128, 16),
        (tiltflow.ImportanceResampling(n=2, beta=0.1), 128, 16),
        (tiltflow.Smc(beta=0.02, num_particles=4, every=1), 64, 24),
        (tiltflow.GradientGuidance(beta=0.1, max_ratio=1.0), 80, 40),
    ],
)
def test_a_pipeline_is_steered_prompt_by_prompt(steering: Any, networks: int, rewards: int, tmp_path: Path) -> None:
    """Four samples of each of two prompts in four steps, with classifier-free guidance."""
    from tiny_pipelines import stable_diffusion

    model = tiltflow.from_diffusers(stable_diffusion(tmp_path), height=32, width=32)

    def red(images: Tensor, prompts: list[str]) -> Tensor:
        assert prompts == prompts[:1] * len(images)
        return images[:, 0].mean((1, 2))

    found = tiltflow.steer(
        model,
        red,
        steering,
        4,
        conditions=["a red cat", "a dog"],
        sampling=Sampling(solver="memoryless", num_inference_steps=4),
        guidance_scale=3.0,
    )
    assert found.samples.shape == (8, 3, 32, 32)
    assert found.conditions == ("a red cat",) * 4 + ("a dog",) * 4
    assert (found.network_evaluations, found.reward_evaluations) == (networks, rewards)
