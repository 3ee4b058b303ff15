"""Three models as others have them, by the programs of docs/your-own-model.md: loaded, tuned, saved, loaded again, sampled."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ddpm_mnist import Network
from torch import Tensor, nn

import tiltflow
from tiltflow.flows.interpolant import Cosine, DiscreteVariancePreserving, Linear
from tiltflow.rewards.class_probability import ClassProbability

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-model.md").read_text(encoding="utf-8")
PROGRAMS = {
    title: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for title, text in re.findall(r"^### (A [^\n]+)\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
}
WEIGHTS = os.environ.get("TILTFLOW_DDPM_MNIST", "")
with_weights = pytest.mark.skipif(
    not WEIGHTS, reason="TILTFLOW_DDPM_MNIST names no ddpm_mnist_starter.pth of github.com/Yichizz/hot_vs_cold_diffusion"
)


class TimeFirst(nn.Module):
    """A network with the arguments of torchcfm's UNetModelWrapper, in its place where torchcfm is not installed."""

    def __init__(self, dim: list[int], num_channels: int, num_res_blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(dim[0] + 1, num_channels, 3, padding=1)
        self.tail = nn.Conv2d(num_channels, dim[0], 3, padding=1)

    def forward(self, t: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        seen = torch.cat([x, t.reshape(-1, 1, 1, 1).expand_as(x)], 1)
        out: Tensor = self.tail(torch.tanh(self.head(seen)))
        return out


def small(code: str) -> str:
    """The program with fewer steps; its settings are those of the page otherwise."""
    for old, new in {"max_train_steps=100": "max_train_steps=1", "beta=0.01": "beta=0.01, num_inference_steps=3"}.items():
        assert old in code
        code = code.replace(old, new)
    return code.replace("train_batch_size=32", "train_batch_size=4").replace("sample(16)", "sample(2)")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("unet", None)


def run(title: str, place: Path) -> dict[str, Any]:
    """Run the program of the page, short as it is, and hold what was loaded against what was tuned, bit for bit."""
    *files, program = PROGRAMS[title]
    for file in files:
        (place / "unet.py").write_text(file)
    lines = [line for text in (*files, program) for line in text.splitlines() if line and not re.match("import|from", line)]
    assert len(lines) < 15
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(small(program), names)
    assert torch.equal(names["images"], names["tuned"].sample(2))
    before = names["network"].state_dict()
    after = names["again"].flow.network.state_dict()
    assert not all(
        torch.equal(before[key], after[key]) for key in before
    )  # it was tuned, and the network that was given was not
    return names


def test_a_ddpm_of_mnist(place: Path) -> None:
    """Of random weights, in the file as it is published."""
    torch.save({"beta_t": torch.zeros(1), **{f"gt.{key}": w for key, w in Network().state_dict().items()}}, "ddpm_mnist.pth")
    names = run("A DDPM of MNIST", place)
    again: Any = names["again"].flow
    assert (again.time_scale, again.interpolant.num_train_timesteps) == (1 / 1000, 1001)


@with_weights
def test_the_published_ddpm_of_mnist(place: Path) -> None:
    """Its schedule is ours to rounding, and what it draws are digits to a classifier, as long as its clock is right."""
    (place / "ddpm_mnist.pth").symlink_to(Path(WEIGHTS).resolve())
    names = run("A DDPM of MNIST", place)
    published = names["weights"]["alpha_t"]
    ours = names["path"].alphas_cumprod.flip(0)[1:]
    assert (ours - published).abs().max() < 1e-6
    model = names["model"]
    assert tiltflow.examine_model(model).level == "green"
    wrong = tiltflow.Model(replace(model.flow, time_scale=1.0), model.event_shape)
    assert classes(2 * model.sample(32)) > 6 > 3 >= classes(2 * wrong.sample(32))  # its pixels are from -0.5 to 0.5


def classes(images: Tensor) -> int:
    """How many of the ten a classifier is sure to see."""
    seen = torch.stack([ClassProbability(classifier="digits-judge", classes=(c,)).build()(images) for c in range(10)])
    return len(seen.argmax(0)[seen.amax(0) > 0.7].unique())


def test_a_unet_of_torchcfm(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchcfm's own where it is installed, else a network that is called as it is."""
    if importlib.util.find_spec("torchcfm") is None:
        for name in ("torchcfm", "torchcfm.models", "torchcfm.models.unet"):
            monkeypatch.setitem(sys.modules, name, type(sys)(name))
        sys.modules["torchcfm.models.unet"].UNetModelWrapper = TimeFirst  # type: ignore[attr-defined]
    run("A U-Net of torchcfm", place)


def test_a_unet_of_diffusers(place: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra diffusers is not installed")
    run("A UNet2DModel of diffusers", place)


def test_what_is_forgotten_is_said(place: Path) -> None:
    """Without the subclass: which order the network has, and what of its output is the prediction."""
    diffusers = pytest.importorskip("diffusers", reason="the extra diffusers is not installed")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    unet = diffusers.UNet2DModel(in_channels=1, out_channels=1, **blocks)
    flow = tiltflow.Flow(unet, "epsilon", DiscreteVariancePreserving())
    with pytest.raises(tiltflow.InputError, match="returns UNet2DOutput; wrap it to return its sample"):
        tiltflow.Model(flow, (1, 16, 16)).sample(2)
    flow = tiltflow.Flow(TimeFirst([1], 8, 1))
    with pytest.raises(tiltflow.InputError, match=r"its arguments are \(t, x, y\): wrap it to be called as network\(x, time\)"):
        tiltflow.Model(flow, (1, 16, 16)).sample(2)


@pytest.mark.parametrize("path", [Cosine(), Linear()])
def test_an_epsilon_on_an_exact_path_begins_where_some_data_is_left(path: Any) -> None:
    """The noise of N(0, 1) data, off by 1 %: at t = 0 that would be all of the velocity."""

    def epsilon(x: Tensor, time: Tensor) -> Tensor:
        c = path(time[:, None])
        return 1.01 * c.beta / (c.alpha**2 + c.beta**2) * x

    model = tiltflow.Model(tiltflow.Flow(epsilon, "epsilon", path), event_shape=(2,))
    for solver in ("ddim", "memoryless"):
        x = model.sample(4000, sampling=tiltflow.Sampling(solver=solver, num_inference_steps=40))
        assert 0.9 < x.std() < 1.1
    assert tiltflow.examine_model(model).level == "green"
    assert model.flow.noise_time == pytest.approx(
        replace(model.flow, interpolant=DiscreteVariancePreserving()).noise_time, rel=5e-3
    )
    assert replace(model.flow, prediction="v").noise_time == 0
