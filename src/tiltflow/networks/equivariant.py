"""A network on molecules, equivariant under rotations, reflections, translations and permutations of atoms.

Each atom has features that do not turn with the molecule and some vectors that do; each pair of atoms has features of its own,
which the distances of these vectors feed. Positions move along differences of positions alone, as in EGNN (2102.09844).
With `triangles`, a pair also hears of the two others that each third atom makes with it, and an atom of the angles between the
ways that its vectors go. All pairs are dense tensors: molecules of some tens of atoms.
"""

# Mutation tests: test_equivariant.py

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from tiltflow.chemistry.atoms import DIM, ELEMENTS, TYPE, VALENCES
from tiltflow.chemistry.composition import asked_of
from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]
RADIAL = 24
"""Functions of a distance that the first features of a pair are made of."""
RAREST = 1e-6
"""Least probability of a number of odd valences, so that its logarithm is finite."""
CLOSEST = 0.05
"""Where types are nearly free of noise, 1 - t is taken to be this at least."""


class Equivariant(Settings):
    name: Literal["equivariant"] = "equivariant"
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    """What each class of the model asks for: a number of atoms, as in "19 atoms", or a composition, as in "C7H10O2", of which
    the types of atoms are given and positions alone are drawn. One that stands there twice is drawn twice as often."""
    features: Count = 96
    """Features of an atom."""
    pair_features: Count = 64
    """Features of a pair of atoms."""
    vectors: Count = 8
    """Vectors of an atom."""
    heads: Count = 4
    """Weighted sums over the other atoms in a layer."""
    layers: Count = 6
    """Layers of messages between atoms."""
    scale: Annotated[float, Field(gt=0)] = 1.4
    """Standard deviation of a coordinate of the data, in Å."""
    triangles: Annotated[int, Field(ge=0)] = 0
    """Products of the features of two pairs, (i, k) and (k, j), that each pair (i, j) hears of in a layer, summed over k; and
    with them each atom of the angles between its vectors' ways. Both begin with weights of zero. 0 for neither."""
    even_valences: bool = False
    """Whether types are conditioned on an even number of atoms with an odd valence, H, N and F, which all closed shells have:
    of each atom by what the others seem to be, as if these were independent."""

    @field_validator("classes")
    @classmethod
    def _known(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        for text in classes:
            asked_of(text)
        return classes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def atoms(self) -> int:
        """Rows of a state: the atoms of the largest class."""
        return max(asked_of(text).atoms for text in self.classes)

    def build(self) -> nn.Module:
        return EquivariantModule(self)


class EquivariantModule(nn.Module):
    """(states [batch, atoms, 3 + types], time [batch], labels [batch]) -> the data that are expected, of the same shape.

    A state has the positions of the atoms in Å, with their mean at zero, and their types. Rows without an atom are zero.
    """

    present: Tensor
    known: Tensor
    given: Tensor

    def __init__(self, settings: Equivariant):
        super().__init__()
        width, pairs, vectors = settings.features, settings.pair_features, settings.vectors
        self.scale, self.even_valences = settings.scale, settings.even_valences
        asked = [asked_of(text) for text in settings.classes]
        present = torch.stack([torch.arange(settings.atoms) < one.atoms for one in asked])
        given = torch.zeros(len(asked), settings.atoms, len(ELEMENTS))
        for label, one in enumerate(asked):
            for row, element in enumerate(one.elements or ()):
                given[label, row, element] = 1
        self.register_buffer("present", present[..., None].float(), persistent=False)
        self.register_buffer("known", torch.tensor([float(one.elements is not None) for one in asked]), persistent=False)
        self.register_buffer("given", given, persistent=False)
        self.atom = nn.Linear(2 * len(ELEMENTS), width)
        self.time = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width + pairs))
        self.near = nn.Linear(2 * RADIAL, pairs)
        nn.init.zeros_(self.near.weight.data[:, RADIAL:])
        self.spread = nn.Parameter(torch.ones(vectors))
        self.layers = nn.ModuleList(
            Layer(width, pairs, vectors, settings.heads, settings.triangles) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.types = nn.Linear(width, len(ELEMENTS))
        self.join = nn.Parameter(torch.zeros(vectors))
        nn.init.zeros_(self.types.weight)
        nn.init.zeros_(self.types.bias)

    def project(self, noise: Tensor, labels: Tensor) -> Tensor:
        """The part of states [batch, atoms, 3 + types] in which noise lies: atoms that are there, around their mean; without
        their types where these are given."""
        labels = labels.to(self.present.device)
        mask = self.of(labels, noise)
        free = 1 - self.known[labels].to(noise)[:, None, None]
        return torch.cat([centred(noise[..., :DIM], mask), noise[..., DIM:] * mask * free], -1)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        positions, logits = self.predict(x, time, labels)
        known, given = self.known[labels].to(x)[:, None, None], self.given[labels, : x.shape[1]].to(x)
        types = torch.where(known > 0, given, logits.softmax(-1) * self.of(labels, x))
        return torch.cat([positions, TYPE * types.to(positions.dtype)], -1)

    def of(self, labels: Tensor, x: Tensor) -> Tensor:
        """Which rows of states [batch, atoms, 3 + types] are atoms: 1 or 0 [batch, atoms, 1]."""
        return self.present[labels, : x.shape[1]].to(x)

    def predict(self, x: Tensor, time: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The expected positions [batch, atoms, 3], and logits of the types [batch, atoms, types]. Rows after the atoms of all
        molecules of the batch may be left out."""
        known, given = self.known[labels].to(x)[:, None, None], self.given[labels, : x.shape[1]].to(x)
        mask = self.of(labels, x)
        positions, logits = self.of_atoms(x, time, mask, torch.where(known > 0, given, 0.0), known)
        return positions, logits + log_even(logits, mask) if self.even_valences else logits

    def of_atoms(self, x: Tensor, time: Tensor, mask: Tensor, given: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """`predict` of atoms that are there where the mask [batch, atoms, 1] is 1, with given types [batch, atoms, types] where
        `known` [batch, 1, 1] is 1."""
        t = time.to(x)[:, None, None]
        skip, into, out = coefficients(t, self.scale)
        positions, noisy = centred(x[..., :DIM], mask), x[..., DIM:] * mask
        # what its own noisy type says of an atom: log N(x; t TYPE e, (1 - t)^2), up to a constant
        evidence = noisy * (t * TYPE / (1 - t).clamp(min=CLOSEST * TYPE) ** 2)
        own = torch.where(known > 0, given, evidence.softmax(-1) * mask)
        bias = self.time(moments(t, mask))
        width = self.norm.normalized_shape[0]
        types = noisy * coefficients(t, TYPE)[1]
        h = self.atom(torch.cat([own, torch.where(known > 0, given, types)], -1)) + bias[..., :width]
        pairs = (mask * mask.transpose(1, 2) * (1 - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)))[..., None]
        start = positions * into
        shape = radial(distances(start[:, None] * self.scale)[:, 0])
        # near the data small differences of lengths say where an atom belongs
        e = self.near(torch.cat([shape, shape * (0.25 / (1.05 - t))[..., None]], -1)) + bias[..., None, width:]
        v = start[:, None] * self.spread.to(x)[:, None, None]
        for layer in self.layers:
            h, e, v = layer(h, e, v, pairs)
        moved = centred((v * self.join.to(x)[:, None, None]).sum(1), mask)
        logits = self.types(self.norm(h)).to(x.dtype) + evidence
        return skip * positions + out * moved, logits


class Layer(nn.Module):
    """Messages between all pairs of atoms.

    h [batch, atoms, features], e [batch, atoms, atoms, pair features], v [batch, vectors, atoms, 3]; pairs
    [batch, atoms, atoms, 1] is 1 where two atoms that are there are not the same.
    """

    def __init__(self, width: int, pairs: int, vectors: int, heads: int, triangles: int):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.left, self.right = nn.Linear(width, pairs), nn.Linear(width, pairs, bias=False)
        self.apart = nn.Linear(2 * vectors, pairs, bias=False)
        self.pair = nn.Sequential(nn.SiLU(), nn.Linear(pairs, pairs), nn.SiLU(), nn.Linear(pairs, pairs))
        self.weights = nn.Linear(pairs, heads + vectors)
        self.heads = heads
        self.message = nn.Linear(heads * pairs, width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.third = Triangles(width, pairs, vectors, triangles) if triangles else None

    def forward(self, h: Tensor, e: Tensor, v: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = distances(v)
        apart = torch.cat([d / (1 + d), torch.exp(-d)], 1).permute(0, 2, 3, 1)
        n = self.before(h)
        heard = e + self.left(n)[:, :, None] + self.right(n)[:, None] + self.apart(apart)
        e = e + self.pair(heard if self.third is None else heard + self.third.of_pairs(heard, pairs))
        gates, pull = self.weights(F.silu(e)).split([self.heads, len(v[0])], -1)
        gates = torch.sigmoid(gates) * pairs
        h = h + self.message((gates.transpose(2, 3).to(e.dtype) @ e).flatten(2)) / 4
        ahead = moved(v, (pull * pairs).permute(0, 3, 1, 2).to(v.dtype) / (1 + d))
        if self.third is not None:
            h = h + self.third.of_atoms(ahead - v)
        return h + self.inner(self.after(h)), e, ahead


class Triangles(nn.Module):
    """What pairs hear of third atoms, as in the multiplicative update of triangles of AlphaFold 2 (Jumper et al. 2021,
    supplement, algorithm 11), and atoms of angles."""

    def __init__(self, width: int, pairs: int, vectors: int, products: int):
        super().__init__()
        self.sides = nn.Linear(pairs, 2 * products)
        self.closing = nn.Linear(products, pairs, bias=False)
        self.angles = nn.Linear(vectors**2, width, bias=False)
        nn.init.zeros_(self.closing.weight)
        nn.init.zeros_(self.angles.weight)

    def of_pairs(self, heard: Tensor, pairs: Tensor) -> Tensor:
        """For each pair (i, j) the sum of products over third atoms [batch, atoms, atoms, pair features], of what pairs have
        heard, of the same shape."""
        first, second = (self.sides(F.silu(heard)) * pairs.to(heard.dtype)).permute(0, 3, 1, 2).chunk(2, 1)
        closed: Tensor = self.closing((first @ second).permute(0, 2, 3, 1) / 3)
        return closed

    def of_atoms(self, ways: Tensor) -> Tensor:
        """Inner products of the ways that the vectors of an atom go [batch, vectors, atoms, 3]: [batch, atoms, features]."""
        ways = ways.transpose(1, 2)
        ways = ways / (1 + ways.square().sum(-1, keepdim=True)).sqrt()
        with torch.autocast(ways.device.type, enabled=False):
            products = (ways @ ways.transpose(-1, -2)).flatten(2)
        seen: Tensor = self.angles(products)
        return seen


def moved(v: Tensor, pull: Tensor) -> Tensor:
    """v_i + sum_j pull_ij (v_i - v_j), of v [batch, vectors, atoms, 3] and pull [batch, vectors, atoms, atoms]."""
    with torch.autocast(v.device.type, enabled=False):
        return v + v * pull.sum(-1, keepdim=True) - pull @ v


def centred(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions [batch, atoms, 3] of the atoms that are there, mask [batch, atoms, 1], with their mean at zero; 0 elsewhere."""
    kept = positions * mask
    return (kept - kept.sum(1, keepdim=True) / mask.sum(1, keepdim=True)) * mask


def distances(v: Tensor) -> Tensor:
    """Distances [batch, vectors, atoms, atoms] of points v [batch, vectors, atoms, 3], with a slope of 0 where they are 0."""
    with torch.autocast(v.device.type, enabled=False):
        squares = v.square().sum(-1)
        apart = squares[..., :, None] + squares[..., None, :] - 2 * v @ v.transpose(-1, -2)
        return (apart.clamp(min=0) + 1e-6).sqrt()


def radial(d: Tensor) -> Tensor:
    """Bumps in exp(-d / 2) [.., RADIAL] of distances d in Å: narrow where bonds are, wide further away."""
    centres = torch.linspace(0, 1, RADIAL, dtype=d.dtype, device=d.device)
    return torch.exp(-((torch.exp(-d / 2)[..., None] - centres) ** 2) * (RADIAL**2 / 2))


def log_even(logits: Tensor, mask: Tensor) -> Tensor:
    """Of each type of each atom [batch, atoms, types], the log of the probability that the other atoms make the number of odd
    valences even, where atoms are independent with these logits, and there where the mask [batch, atoms, 1] is 1. Added to the
    logits, it makes them those given that the number is even."""
    sign = logits.new_tensor([1.0 - 2 * (valence % 2) for valence in VALENCES])
    of_atom = torch.where(mask > 0, (logits.softmax(-1) * sign).sum(-1, keepdim=True), 1.0)
    own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    others = torch.where(own, 1.0, of_atom.transpose(1, 2)).prod(-1, keepdim=True)  # E of the sign of the others' number
    return ((1 + sign * others) / 2).clamp(min=RAREST).log()


def coefficients(t: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of x_t in the expected data, of x_t at the input of the network, and of its output: with data of standard
    deviation `scale`, both its input and what it has to predict are of size 1 at every time (2206.00364, table 1)."""
    variance = (t * scale) ** 2 + (1 - t) ** 2
    return t * scale**2 / variance, variance.rsqrt(), (1 - t) * scale * variance.rsqrt()


def moments(t: Tensor, mask: Tensor) -> Tensor:
    """What the network is told of the time t [batch, 1, 1] and of the number of atoms: [batch, 1, 9]."""
    angle = torch.pi * t * torch.tensor([1.0, 2.0, 4.0], dtype=t.dtype, device=t.device)
    ratio = torch.log((t + 1e-3) / (1 - t + 1e-3)) / 4
    return torch.cat([t, ratio, angle.cos(), angle.sin(), mask.sum(1, keepdim=True) / 20], -1)
