"""Pretraining of a generative model of molecules: positions and types of atoms, from geometries of small molecules."""

# Mutation tests: test_pretrain_molecules.py

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiltflow.chemistry.atoms import DIM, ELEMENTS, NUMBERS, TYPE, Molecule, molecules_of, samples_of
from tiltflow.chemistry.composition import Asked, asked_of
from tiltflow.chemistry.geometries import Geometries, load_geometries
from tiltflow.chemistry.validity import (
    beyond_minima,
    bond_length_errors,
    bond_lengths,
    canonical_smiles,
    composition,
    shares,
    structures,
)
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import interior
from tiltflow.models.model import Model
from tiltflow.models.model_folder import load_network, model_folder, read_config
from tiltflow.networks.equivariant import Equivariant, EquivariantModule, coefficients
from tiltflow.pretraining.loop import Stage
from tiltflow.pretraining.recipe import Pretraining, Scores
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network, stream


class MoleculesPretraining(Pretraining):
    """Regress the positions of a molecule, and classify its atoms, at a random time of the linear path."""

    task: Literal["molecules"] = "molecules"
    network: Equivariant
    """The network that is trained; its classes say which molecules of the data are used."""
    max_heavy_atoms: Annotated[int, Field(ge=1)] | None = None
    """Molecules with more atoms other than hydrogen are left out."""
    init_from: str | None = None
    """Model whose weights training begins with, by shipped name or folder: of the same network, but for classes and scale, or
    of one that has no triangles yet."""
    conformers: Annotated[int, Field(ge=1)] = 5
    """Geometries that are tried for each SMILES."""
    type_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the cross-entropy of the types beside the squared error of the positions."""
    bond_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared errors along bonds beside that of all positions: of differences of two atoms that x_t has no
    further apart than a bond, in the direction that they have there. As both are known from x_t, expected positions are still
    the best prediction; lengths of bonds are a small part of the error, and are learned sooner with more weight."""
    logit_mean: float = 1.0
    """Mean of the normal variable whose sigmoid the times of the training are (arXiv 2403.03206, section 3.1). By default most
    are where a molecule is decided, at t = 0.55 to 0.85; at 3.5 a model goes on near t = 1, where bonds find their
    lengths."""
    logit_std: Annotated[float, Field(gt=0)] = 0.65
    """Its standard deviation."""
    uniform_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the times that are uniform in place of that."""
    keep_before: Annotated[float, Field(gt=0, le=1)] | None = None
    """Time before which the model of `init_from` is to stay as it is: its predictions are the targets there, not the data."""
    sampling: Sampling = Sampling()
    """Solver and grid of the saved model where nothing else is asked for."""
    num_samples: Annotated[int, Field(ge=0)] = 1000
    """Samples that the scores on the card are of; 0 for none, which needs no RDKit."""

    @model_validator(mode="after")
    def _there_is_something_to_keep(self) -> Self:
        if self.keep_before is not None and self.init_from is None:
            raise ValueError("keep_before: needs a model to keep, in init_from")
        return self

    def prepare(self, path: Path, device: str) -> MoleculesTask:
        formulas = {text for text in self.network.classes if asked_of(text).elements is not None}
        formula = next(iter(formulas)) if len(formulas) == len(set(self.network.classes)) == 1 else None
        found = load_geometries(path, max_heavy_atoms=self.max_heavy_atoms, formula=formula, conformers=self.conformers)
        data = of_classes(found, self.network, path)
        network = new_network(self.network, self.seed)
        assert isinstance(network, EquivariantModule)
        if self.init_from is not None:
            network.load_state_dict(network.state_dict() | weights_of(self.init_from, self.network))
        kept = None if self.keep_before is None else deepcopy(network).to(device)
        return MoleculesTask(self, network.to(device), data.to(device), kept)


RECIPE = MoleculesPretraining
REFERENCE = 2000
"""Geometries of the data, if there are not more samples, whose bonds are compared."""
CLOSE = 1.7
"""Distance in Å that two atoms with a bond between them have at most."""
PARTS = 4
"""Parts of a batch, by the number of atoms: few pairs are computed of which one atom is not there."""


def weights_of(name_or_path: str, network: Equivariant) -> dict[str, Tensor]:
    """The weights of a model for a network that may differ in what has no weights, and may have triangles where the model has
    none. Raises InputError if there are none."""
    config = read_config(folder := model_folder(name_or_path))
    found, free = config.network, {"classes", "scale", "even_valences"}
    if isinstance(found, Equivariant) and not found.triangles:
        free = free | {"triangles"}
    if not isinstance(found, Equivariant) or found.model_dump(exclude=free) != network.model_dump(exclude=free):
        raise InputError(
            f"init_from {name_or_path}: must have the recipe's network, but for its classes, scale and even_valences, "
            "and for triangles where it has none"
        )
    return load_network(folder, config, "cpu").state_dict()


@dataclass(frozen=True)
class Data:
    """Geometries of the molecules that a model is trained on, those of a molecule one after the other.

    Args:
        samples: [geometries, atoms, 3 + types].
        labels: the class of each [geometries].
        smiles: of the molecules.
        first, count: the first geometry of each molecule, and how many it has [molecules].
    """

    samples: Tensor
    labels: Tensor
    smiles: tuple[str, ...]
    first: Tensor
    count: Tensor

    def to(self, device: str) -> Data:
        """The same on a device."""
        return Data(self.samples.to(device), self.labels.to(device), self.smiles, self.first.to(device), self.count.to(device))

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Indices of geometries [size]: of molecules that are equally likely, each in one of its geometries."""
        device = self.first.device
        which = torch.randint(len(self.first), (size,), generator=generator, device=device)
        part = torch.rand(size, generator=generator, device=device)
        return self.first[which] + (part * self.count[which]).long()


def of_classes(geometries: Geometries, network: Equivariant, path: Path) -> Data:
    """The geometries that the classes of a network ask for, their atoms in the order of its states. Raises InputError if a
    class has none."""
    asked = [asked_of(text) for text in network.classes]
    sizes = {one.atoms: one for one in asked if one.elements is None}
    formulas = {formula_of(one): one for one in asked if one.elements is not None}
    kept, labels, names = list[Molecule](), list[int](), list[str]()
    for molecule, name in zip(geometries.molecules(), geometries.smiles.tolist(), strict=True):
        one = formulas.get(molecule.formula) or sizes.get(len(molecule))
        if one is not None:
            kept.append(in_order(molecule, one))
            labels.append(asked.index(one))
            names.append(name)
    for text, one in zip(network.classes, asked, strict=True):
        if asked.index(one) not in labels:
            raise InputError(f"{path}: has no molecule of {text}, which network.classes asks for")
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    first = torch.tensor(starts)
    count = torch.diff(first, append=torch.tensor([len(names)]))
    return Data(samples_of(kept, network.atoms), torch.tensor(labels), tuple(names[i] for i in starts), first, count)


def formula_of(asked: Asked) -> str:
    """The formula of a composition, as that of a molecule is written."""
    numbers = np.array([NUMBERS[element] for element in asked.elements or ()])
    return Molecule(numbers, np.zeros((asked.atoms, DIM))).formula


def in_order(molecule: Molecule, asked: Asked) -> Molecule:
    """A molecule with its atoms in the order of a composition; as it is where types are free."""
    if asked.elements is None:
        return molecule
    places = [asked.elements.index(NUMBERS.index(number)) for number in molecule.numbers.tolist()]
    order = np.argsort(places, kind="stable")
    return Molecule(molecule.numbers[order], molecule.positions[order])


@dataclass(frozen=True)
class MoleculesTask:
    """A generative model of molecules, and the geometries that it is trained on."""

    recipe: MoleculesPretraining
    network: EquivariantModule
    train: Data
    kept: EquivariantModule | None
    """The network of before, if a part of it is to stay."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {self.recipe.network.name: self.network}

    @property
    def model(self) -> Model:
        """The network as a model that can be sampled and saved."""
        settings = self.recipe.network
        flow = Flow(self.network, "x1", projection=self.network.project)
        return Model(flow, (settings.atoms, DIM + len(ELEMENTS)), self.recipe.sampling, settings, settings.classes)

    def stages(self) -> Iterator[Stage]:
        recipe, data = self.recipe, self.train
        generator = stream(recipe.seed, "noise", device=data.samples.device)

        sizes = self.network.present.sum((1, 2)).long()[data.labels]

        def loss() -> Tensor:
            index = data.draw(recipe.training.train_batch_size, generator)
            t = draw_times(len(index), generator, recipe.logit_mean, recipe.logit_std, recipe.uniform_share)
            order = sizes[index].argsort(stable=True)
            index, t = index[order], t[order]  # together: which times are uniform has nothing to do with the size
            losses = (loss_of(*part) * len(part[0]) for part in zip(index.chunk(PARTS), t.chunk(PARTS), strict=True))
            return torch.stack([*losses]).sum() / len(index)

        def loss_of(index: Tensor, t: Tensor) -> Tensor:
            x1 = data.samples[index, : sizes[index].max()]
            kept = None if self.kept is None else (self.kept, t < (recipe.keep_before or 0))
            return molecules_loss(
                self.network, x1, data.labels[index], t, generator, recipe.type_weight, kept, recipe.bond_weight
            )

        yield Stage("training", (self.network,), recipe.training, loss)

    def save(self, folder: Path, card: str) -> None:
        self.model.save(folder, card)

    def scores(self) -> Scores:
        count = self.recipe.num_samples
        return scored(self.model.sample(count), self.train) if count else {}

    def data(self) -> str:
        return f"{len(self.train.smiles):,} molecules in {len(self.train.samples):,} geometries (ETKDGv3 and MMFF94, not DFT)"

    def remarks(self) -> list[str]:
        begun = self.recipe.init_from
        return [] if begun is None else [f"Training began with the weights of `{Path(begun).name}`."]


def draw_times(
    count: int, generator: torch.Generator, logit_mean: float = 1.0, logit_std: float = 0.65, uniform_share: float = 0.2
) -> Tensor:
    """Times [count]: a share of them, the first ones, uniform; the others the sigmoid of N(logit_mean, logit_std^2)."""
    uniform, normal = (draw(count, generator=generator, device=generator.device) for draw in (torch.rand, torch.randn))
    first = torch.arange(count, device=generator.device) < round(uniform_share * count)
    return interior(torch.where(first, uniform, torch.sigmoid(logit_std * normal + logit_mean)))


def molecules_loss(
    network: EquivariantModule,
    x1: Tensor,
    labels: Tensor,
    t: Tensor,
    generator: torch.Generator,
    type_weight: float,
    kept: tuple[EquivariantModule, Tensor] | None = None,
    bond_weight: float = 0.0,
) -> Tensor:
    """Squared error of the positions, in units of what the network has to add to x_t, and cross-entropy of the types. Both are
    least at the posterior means: of positions, and of one-hot types. So is the squared error along bonds, a quadratic form of
    the same differences that x_t alone determines.

    Noise is independent of the data: a sampler with noise turns the velocity into a score, which it would not be of pairs that
    are aligned.

    Args:
        x1: data [batch, atoms, 3 + types].
        labels, t: of each [batch].
        kept: a network, and rows [batch] whose targets are its predictions in place of the data.
        bond_weight: of the error along bonds.
    """
    x0 = network.project(torch.randn(x1.shape, generator=generator, device=x1.device), labels)
    s = t[:, None, None]
    x = s * x1 + (1 - s) * x0
    targets, types = x1[..., :DIM], x1[..., DIM:] / TYPE
    if kept is not None and kept[1].any():
        other, rows = kept
        with torch.no_grad():
            means, others = other.predict(x[rows], t[rows], labels[rows])
        targets, types = targets.clone(), types.clone()
        targets[rows], types[rows] = means, others.softmax(-1) * other.of(labels[rows], x)
    positions, logits = network.predict(x, t, labels)
    atoms = network.present[labels].sum((1, 2))
    wrong = (positions - targets) / coefficients(s, network.scale)[2]
    error = wrong.square().sum((1, 2)) / (DIM * atoms)
    if bond_weight:
        error = error + bond_weight * along_bonds(wrong, x[..., :DIM] / s, network.of(labels, x)) / (DIM * atoms)
    unsure = -(logits.float().log_softmax(-1) * types).sum((1, 2)) / atoms * (1 - network.known[labels])
    return (error + type_weight * unsure).mean()


def along_bonds(wrong: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Squared errors [batch] of positions, summed over pairs of atoms that are close: of the difference of the errors of the
    two, along the line between them.

    Args:
        wrong, positions: errors, and where atoms are in Å [batch, atoms, 3].
        mask: 1 at atoms that are there [batch, atoms, 1].
    """
    lines = positions[:, :, None] - positions[:, None]
    apart = lines.norm(dim=-1)
    close = (apart < CLOSE) * (apart > 0) * mask * mask.transpose(1, 2)
    stretched = ((wrong[:, :, None] - wrong[:, None]) * lines).sum(-1) / apart.clamp(min=1e-6)
    total: Tensor = (close * stretched.square()).sum((1, 2)) / 2
    return total


def scored(samples: Tensor, train: Data) -> Scores:
    """Measure samples [n, atoms, 3 + types]: shares that are valid, connected, unique among these and novel, how far their
    compositions are from the data's, and how long bonds are beside those of 2,000 geometries, and beside
    the same bonds in the nearest minima of the force field. `_data` is the same of as many geometries as samples."""
    drawn = train.draw(max(len(samples), REFERENCE), stream(0, "score"))
    ours, reference = (molecules_of(each) for each in (samples, train.samples[drawn]))
    theirs = reference[: len(ours)]
    found = shares(structures(ours), canonical_smiles(train.smiles))
    scores: Scores = {key: value for key, value in vars(found).items() if value is not None}
    scores["connected_data"] = shares(structures(theirs)).connected
    scores["composition_distance"] = total_variation(composition(ours), composition(theirs))
    beyond = beyond_minima(ours)
    for bond in bond_length_errors(bond_lengths(ours), bond_lengths(reference)):
        mean = f"{bond.mean:.4f} ± {bond.spread / math.sqrt(bond.count):.4f}, spread {bond.spread:.4f}"
        line = f"{mean}; data {bond.reference_mean:.4f}, {bond.reference_spread:.4f}"
        if (own := beyond.get(bond.kind)) is not None:
            line += f"; {own.mean():+.4f} ± {own.std() / math.sqrt(len(own)):.4f} beyond its minimum"
        scores[f"{bond.kind} in Å"] = line
    return scores


def total_variation(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Half the summed difference between two distributions, given by counts of equal sum: 0 to 1."""
    total = sum(first.values())
    return sum(abs(first.get(key, 0) - second.get(key, 0)) for key in first.keys() | second.keys()) / (2 * total)
