"""Two small kinds of model beside tiltflow's own: nothing outside `models/` may know which one it has."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.flow import Flow
from tiltflow.flows.guided import Guided
from tiltflow.models.trainable import Adapter, trainable_copy
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream


@dataclass(frozen=True)
class Kind(ABC):
    """What both have: a flow, a copy of which is trained, and samples that are decoded from states on the CPU."""

    flow: Flow
    sampling: Sampling = field(default_factory=lambda: Sampling(num_inference_steps=60))
    guidance_scale: float = 1.0
    has_decoder: bool = True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def grid(self) -> float:
        return self.flow.noise_time

    own_grid = grid

    def draw(
        self,
        items: Sequence[Item],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        parts, chosen = [], sampling or self.sampling
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        for i, begin in enumerate(range(0, len(items), batch_size)):
            some, generator = items[begin : begin + batch_size], stream(seed, "sample", i)
            condition, negative = self.conditions(some)
            flow: Any = self.flow.bind(condition)
            if scale > 1:
                flow = Guided(flow, self.flow.bind(negative), scale)
            x = self.noise(some, generator, chosen.times(self.grid)[0])
            with torch.no_grad(), eval_mode(self.flow.network):
                x = sample(flow, x, chosen, generator, start=self.grid)
                parts.append(self.decode(x, batch_size=batch_size))
        return torch.cat(parts)

    @abstractmethod
    def conditions(self, items: Sequence[Item]) -> tuple[Any, Any]: ...

    @abstractmethod
    def noise(self, items: Sequence[Item], generator: torch.Generator, t: Tensor) -> Tensor: ...

    @abstractmethod
    def decode(self, x: Tensor, *, batch_size: int) -> Tensor: ...

    def trainable(self, adapter: Adapter | None = None, pattern: str | re.Pattern[str] = "", *, seed: int = 0) -> Any:
        if adapter is not None:
            raise InputError("adapter: this kind has none")
        return self, replace(self, flow=trainable_copy(self.flow, pattern))

    def base(self) -> Any:
        return replace(self, flow=replace(self.flow, network=copy.deepcopy(self.flow.network)))

    def in_precision(self, dtype: torch.dtype | None) -> Any:
        return replace(self, flow=replace(self.flow, autocast=dtype))

    def save(self, folder: str | Path, card: str = "") -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        network: Any = self.flow.network
        save_file(network.state_dict(), Path(folder) / "model.safetensors")


# ---- ragged: padded, masked, with zero centre of mass ----

ATOMS, SPACE = 3, 2
VARIANCE = 0.25


def projected(x: Tensor, mask: Tensor) -> Tensor:
    """The part of x [batch, ATOMS, SPACE] on the atoms that are there, mask [batch, ATOMS, 1], with their centre at 0."""
    kept = x * mask
    return (kept - kept.sum(1, keepdim=True) / mask.sum(1, keepdim=True)) * mask


class Cloud(nn.Module):
    """The velocity of N(P m, VARIANCE P), P the projection; m is learned, one for each number of atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(ATOMS + 1, ATOMS, SPACE))

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        t = time[:, None, None].to(x.dtype)
        mean = projected(self.mean[mask.sum((1, 2)).long()], mask)
        slope = (VARIANCE * t - (1 - t)) / (VARIANCE * t**2 + (1 - t) ** 2)
        return mean + slope * (projected(x, mask) - t * mean)


@dataclass(frozen=True)
class Ragged(Kind):
    """Clouds of two or three points around their centre: the size is what is asked for."""

    has_decoder: bool = False
    class_names: tuple[str, ...] = ("two", "three")
    prompted: bool = False
    event_shape: tuple[int, ...] = (ATOMS, SPACE)
    sample_shape: tuple[int, ...] = (ATOMS, SPACE)

    @classmethod
    def make(cls) -> Ragged:
        return cls(Flow(Cloud(), projection=projected))

    def conditions(self, items: Sequence[Item]) -> tuple[Tensor, None]:
        sizes = torch.tensor([item.metadata["label"] + 2 for item in items])
        return (torch.arange(ATOMS) < sizes[:, None]).float()[..., None], None

    def noise(self, items: Sequence[Item], generator: torch.Generator, t: Tensor) -> Tensor:
        return projected(torch.randn(len(items), *self.event_shape, generator=generator), self.conditions(items)[0])

    def decode(self, x: Tensor, *, batch_size: int) -> Tensor:
        return x


# ---- 5-D: latents of videos, with a decoder, prompts and guidance ----

CHANNELS, FRAMES, SIDE = 2, 3, 4


class Clip(nn.Module):
    """A small velocity field on latents [batch, CHANNELS, FRAMES, SIDE, SIDE] that a number of the prompt moves."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
        self.of_prompt = nn.Linear(1, CHANNELS)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        shift = self.of_prompt(condition)[:, :, None, None, None]
        found: Tensor = 0.3 * self.convolution(x) + shift - x * (1 - time.to(x.dtype))[:, None, None, None, None]
        return found


@dataclass(frozen=True)
class Video(Kind):
    """Videos [3, FRAMES, 2 SIDE, 2 SIDE] in about [-1, 1]."""

    class_names: tuple[str, ...] = ()
    prompted: bool = True
    event_shape: tuple[int, ...] = (CHANNELS, FRAMES, SIDE, SIDE)
    sample_shape: tuple[int, ...] = (3, FRAMES, 2 * SIDE, 2 * SIDE)
    colours: Tensor = field(default_factory=lambda: torch.tensor([[1.0, 0.2], [-0.5, 0.8], [0.1, -1.0]]))

    @classmethod
    def make(cls) -> Video:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return cls(Flow(Clip()), Sampling(solver="euler", num_inference_steps=4), guidance_scale=2.0)

    def conditions(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        numbers = torch.tensor([[len(item.text) / 10] for item in items])
        return numbers, torch.zeros_like(numbers)

    def noise(self, items: Sequence[Item], generator: torch.Generator, t: Tensor) -> Tensor:
        return torch.randn(len(items), *self.event_shape, generator=generator)

    def decode(self, x: Tensor, *, batch_size: int) -> Tensor:
        mixed = torch.einsum("oc,ncthw->nothw", self.colours, x)
        return torch.tanh(nn.functional.interpolate(mixed, scale_factor=(1, 2, 2)))
