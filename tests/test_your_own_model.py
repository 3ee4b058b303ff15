"""The README's quickstart as it stands; and the code of docs/your-own-model.md: each block runs, on networks that are exact in
the convention that it is about."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiltflow
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import DiscreteVariancePreserving
from tiltflow.models.consistency import consistency
from tiltflow.models.model import Model
from tiltflow.problems.mixture import Mixture
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.functions.prompted import given
from tiltflow.samplers.sampling import Sampling

ROOT = Path(__file__).parents[1]
WHOLE = (ROOT / "docs" / "your-own-model.md").read_text(encoding="utf-8")
PAGE = re.sub(
    r"^## Three models of others, whole$.*?^(?=## )", "", WHOLE, flags=re.MULTILINE | re.DOTALL
)  # test_third_party.py
BLOCKS = dict(re.findall(r"^#+ ([^\n]+)\n(?:(?!^#+ ).)*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
LAW = Mixture(dimension=2, modes=3, scale=0.4).base()


@dataclass
class Output:
    sample: Tensor


class Exact(nn.Module):
    """The field of the mixture, in some convention."""

    def __init__(self, convention: Any) -> None:
        super().__init__()
        self.convention, self.bias = convention, nn.Parameter(torch.zeros(2))

    def forward(self, *arguments: Tensor) -> Any:
        return self.convention(self, *arguments)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return LAW.velocity(x, t) + self.bias


def ddpm(self: Exact, x: Tensor, timestep: Tensor) -> Output:
    """Epsilon of x_i = sqrt(abar_i) x_1 + sqrt(1 - abar_i) x_0, at the timesteps of a DDPMScheduler with its default betas."""
    assert float(timestep.max()) <= 999
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    left = timestep.long().clamp(max=998)
    part = timestep.double() - left
    square = (bar[left] + part * (bar[left + 1] - bar[left])).to(x)
    alpha, beta = square.sqrt()[:, None], (1 - square).sqrt()[:, None]
    t = (alpha / (alpha + beta))[:, 0]
    z = x / (alpha + beta)
    return Output(z - t[:, None] * self.velocity(z, t))


CONVENTIONS: dict[str, Any] = {
    "torchcfm: the time comes first": lambda self, t, x: self.velocity(x, t),
    "flow_matching: as it is, with CondOTScheduler": lambda self, x, t: self.velocity(x, t),
    "Rectified flow: the velocity, at times up to 999": lambda self, x, t: self.velocity(x, t / 999),
    "Data at time 0, noise at time 1": lambda self, x, t: -self.velocity(x, 1 - t),
    "diffusers' flow transformers: sigma from 0 for data to 1000 for noise": lambda self, x, t: Output(
        -self.velocity(x, 1 - t / 1000)
    ),
    "diffusers' UNet2DModel: epsilon, at the timesteps 0 to 999 of a DDPMScheduler": ddpm,
    "A network that also predicts a variance (learn_sigma)": lambda self, x, t: torch.cat([self.velocity(x, t), x], 1),
}


def names(**more: Any) -> dict[str, Any]:
    space: dict[str, Any] = dict(more)
    exec(BLOCKS["Your own model and reward"], space)
    exec(re.search(r"class Sample\(.*?sample$", PAGE, re.MULTILINE | re.DOTALL)[0], space)  # type: ignore[index]
    return space


def test_the_quickstart_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands: no warning, each cloud at its own tilt, and a report that knows the target."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## Your own model.*?^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert found is not None
    ten = found[1].partition("# the ten lines\n")[2].splitlines()
    assert len([line for line in ten if line]) <= 10
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        exec(found[1], space)
    assert space["left"].shape == (1000, 2)
    before = space["model"].sample(1000, labels="left")
    shift = before[:, 1].var() / 0.5  # of a normal law
    assert (space["left"].mean(0) - before.mean(0) - torch.tensor([0.0, shift])).abs().max() < 0.15
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert abs(summary["reward_tuned"] - summary["reward_target"]) < 0.15
    assert Path("runs/mine/report.html").exists()


def test_every_block_of_the_page_is_here() -> None:
    assert len(re.findall(r"^```python$", PAGE, re.MULTILINE)) == len(BLOCKS)
    assert len(PAGE) < len(WHOLE)
    assert set(BLOCKS) == {"Your own model and reward", "Is it right?", "The reward", *CONVENTIONS}


@pytest.mark.parametrize("title", CONVENTIONS)
def test_conventions_of_other_libraries(title: str) -> None:
    space = names(network=Exact(CONVENTIONS[title]))
    exec(BLOCKS[title], space)
    model: Model = space["model"]
    assert not consistency(model).wrong
    sampling = Sampling(solver="heun", num_inference_steps=40)
    expected = Model(Flow(LAW.velocity), (2,), sampling).sample(256)
    found = model.sample(256, sampling=sampling)
    # a diffusion starts a little after t = 0, from the same noise
    slack = 0.15 if isinstance(model.flow.interpolant, DiscreteVariancePreserving) else 1e-3
    assert (found - expected).norm(dim=1).median() < slack
    exec(BLOCKS["Is it right?"], space)
    assert space["finding"].level == "green"
    before = space["network"].bias.detach().clone()
    method = tiltflow.AdjointMatching(num_inference_steps=3)
    fast = tiltflow.Optimizer(learning_rate=0.1, lr_warmup_steps=0, lr_scheduler="constant")
    training = tiltflow.Training(max_train_steps=1, train_batch_size=16)
    (bias,) = tiltflow.tune(model, lambda x: x.sum(1), method, training, optimizer=fast).flow.parameters()
    assert torch.equal(space["network"].bias, before)
    assert (bias - before).min() > 0.05  # toward more reward, whichever way the network's own velocity points


def test_the_reward() -> None:
    space = names(brightness=lambda images: images.mean((1, 2, 3)))
    exec(BLOCKS["The reward"], space)
    x = torch.rand(2, 3, 4, 4)
    reward = given(from_function(space["reward"]), ["a", "b"], [{"bonus": 1.0}, {"bonus": 2.0}])
    torch.testing.assert_close(evaluate(reward, x), x.mean((1, 2, 3)) + torch.tensor([1.0, 2.0]))
