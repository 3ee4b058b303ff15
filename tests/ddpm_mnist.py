"""A network as people have it: that of a DDPM of MNIST which is public (Yichizz/hot_vs_cold_diffusion, MIT), written anew, so
that its weights fit. Convolutions of 7 x 7 at full size, each with a norm of the whole picture; times from 0 to 1 as sines."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A convolution, a norm over channels and places, GELU."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(ins, outs, 7, padding=3), nn.LayerNorm((outs, 28, 28)), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Network(nn.Module):
    """Noise of x [batch, 1, 28, 28] at the time i / 1000 of step i, [batch]."""

    frequencies: Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = (1, width, 2 * width, 2 * width, width)
        blocks = [Block(ins, outs) for ins, outs in pairwise(sizes)]
        self.blocks = nn.ModuleList([*blocks, nn.Conv2d(width, 1, 3, padding=1)])
        layers = [layer for ins in (32, 128, 128) for layer in (nn.Linear(ins, 128), nn.GELU())]
        self.time_embed = nn.Sequential(*layers, nn.Linear(128, width))
        self.register_buffer("frequencies", torch.tensor([0.0, *(2 * math.pi * 1.5**i for i in range(15))]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phases = t[:, None] * self.frequencies
        seen = self.time_embed(torch.cat([phases.sin(), phases.cos() - 1], 1))
        x = self.blocks[0](x) + seen[:, :, None, None]
        for block in self.blocks[1:]:
            x = block(x)
        return x
