"""What molecules are measured by: bonds from geometries, and energies and gradients by xTB.

    python benchmarks/molecules.py bonds SMILES.csv    which reach of a bond finds a molecule again, by how far atoms are moved
    python benchmarks/molecules.py composition SMILES.csv    what each element adds to -E, and what is left
    python benchmarks/molecules.py gradients SMILES.csv    lengths of the gradient of -E, by how far atoms are moved
    python benchmarks/molecules.py adjoints qm9-isomers    adjoints and losses of the base, by grid and damping
    python benchmarks/molecules.py decided MODEL GEOMETRIES.npz    what becomes of data that are noised up to a time

SMILES.csv is a file of SMILES, such as those of QM9, of which some are drawn at random: 1,000 for energies, of others 500 of at
most seven heavy atoms. Methods that tune for energies are compared by `tiltflow compare --recipes qm9-isomers`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from tiltflow.chemistry import bonds
from tiltflow.chemistry.atoms import ELEMENTS, NUMBERS, Molecule, molecules_of
from tiltflow.chemistry.embedding import rdkit
from tiltflow.chemistry.geometries import Geometries, load_geometries, made_of, read_smiles, selected
from tiltflow.chemistry.validity import shares, structures
from tiltflow.chemistry.workers import Workers
from tiltflow.chemistry.xtb import Answer, Hamiltonian, Question, single_point
from tiltflow.methods.adjoint_matching import AdjointMatching, State
from tiltflow.models.model import load
from tiltflow.networks.equivariant import Equivariant
from tiltflow.pretraining.tasks.molecules import of_classes
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.samplers.rollout import sample
from tiltflow.settings import validate
from tiltflow.streams import normal, stream
from tiltflow.training.batch import Batch

REACHES = (1.15, 1.18, 1.20, 1.22, 1.25, 1.30)
MOVES = (0.0, 0.03, 0.05, 0.08)
TIMES = (0.1, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)


Tree = dict[str, Any]


def some(data: Path, count: int, seed: int) -> Geometries:
    """So many of the geometries, at random."""
    made = load_geometries(data, max_heavy_atoms=7)
    chosen = np.random.default_rng(seed).permutation(len(made))[:count]
    return Geometries(made.numbers[chosen], made.positions[chosen], made.smiles[chosen])


def find_bonds(data: Path, seed: int = 0) -> None:
    """Print the share of molecules that are found again from their positions, each moved by Gaussian noise."""
    made, chem, rng = some(data, 500, seed), rdkit(), np.random.default_rng(seed)
    meant = [bonds.smiles_of(chem.MolFromSmiles(smiles)) for smiles in made.smiles.tolist()]
    print("| moved by, Å | " + " | ".join(f"{reach:.2f}" for reach in REACHES) + " |\n|" + "---|" * (len(REACHES) + 1))
    for move in MOVES:
        moved = [Molecule(each.numbers, each.positions + move * rng.normal(size=(len(each), 3))) for each in made.molecules()]
        shares = []
        for bonds.REACH in REACHES:
            found = [bonds.bonded(each) for each in moved]
            shares.append(np.mean([mol is not None and bonds.smiles_of(mol) == m for mol, m in zip(found, meant, strict=True)]))
        print(f"| {move} | " + " | ".join(f"{share:.1%}" for share in shares) + " |", flush=True)


def fit_composition(data: Path, seed: int = 0, count: int = 1000) -> None:
    """Print the least-squares fit of -E, without a constant, to the numbers of atoms, and what it leaves."""
    workers, lines = Workers(), read_smiles(data)
    chosen = np.random.default_rng(seed).permutation(len(lines))[:count]
    smiles, _ = selected([lines[i] for i in chosen], data, workers)
    molecules = made_of(smiles, workers).molecules()
    counts = np.array([[(each.numbers == number).sum() for number in NUMBERS] for each in molecules], dtype=float)
    print("| method | mean | sd | " + " | ".join(ELEMENTS) + " | sd left | R² | largest left |\n|" + "---|" * 11)
    for method in get_args(Hamiltonian):
        found = list(workers.map(single_point, [Question(each.numbers, each.positions, method) for each in molecules]))
        known = np.array([isinstance(answer, Answer) for answer in found])
        energies = np.array([-answer.energy for answer in found if isinstance(answer, Answer)])
        shares = np.linalg.lstsq(counts[known], energies, rcond=None)[0]
        left = energies - counts[known] @ shares
        numbers = [energies.mean(), energies.std(), *shares, left.std(), 1 - left.var() / energies.var(), np.abs(left).max()]
        print(
            f"| {method}, {known.sum()} of {len(found)} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |",
            flush=True,
        )


def find_gradients(data: Path, seed: int = 0) -> None:
    """Print the median, the 90 % quantile and the largest norm of the gradient of a molecule's energy, by GFN1-xTB."""
    made, workers, rng = some(data, 500, seed), Workers(), np.random.default_rng(seed)
    print("| moved by, Å | failed | median, hartree/Å | 90 % | largest |\n|---|---|---|---|---|")
    for move in (0.0, 0.05, 0.1, 0.2, 0.4):
        moved = [Question(each.numbers, each.positions + move * rng.normal(size=(len(each), 3))) for each in made.molecules()]
        found = [answer for answer in workers.map(single_point, moved) if isinstance(answer, Answer)]
        norms = [float(np.linalg.norm(answer.gradient)) for answer in found]
        middle, high, largest = np.quantile(norms, [0.5, 0.9, 1.0])
        print(f"| {move} | {len(moved) - len(found)} of {len(moved)} | {middle:.2f} | {high:.2f} | {largest:.1f} |", flush=True)


# ---- the first gradients of Adjoint Matching ----

DAMPED: dict[str, Tree] = {
    "even steps, as the method is": {"shift": 1.0, "bootstrap": 0.0, "drop_quantile": None, "loss_clip": None},
    "steps of the model": {"bootstrap": 0.0, "drop_quantile": None, "loss_clip": None},
    "and bootstrap": {"drop_quantile": None, "loss_clip": None},
    "and without the largest terms": {},
}
"""Settings beside those of the recipe, which has all three remedies."""


def find_adjoints(name: str, batches: int, size: int, seed: int, sets: Sequence[str]) -> None:
    """Print losses of the recipe's method at the base, batch by batch, and how far the gradients of batches point one way."""
    tree = read_recipe_tree(find_recipe(name, "train"), sets)
    base, reward = load(tree["model"]), validate(Recipe, tree, name).reward.build()
    base, tuned = base.trainable(seed=seed)
    parameters = [p for p in tuned.flow.parameters() if p.requires_grad]
    print("| method | loss: median of batches | largest | mean cosine of two gradients |\n|---|---|---|---|")
    for words, other in DAMPED.items():
        method, losses, gradients = validate(AdjointMatching, tree["method"] | other, name), [], []
        for i in range(batches):
            labels = base.labels(size)
            x = base.bound(labels).project(base.start(size, stream(seed, "start", i)))
            batch = Batch(x, tuned.bound(labels), base.bound(labels), reward, stream(seed, "rollout", i))
            losses.append(next(method.gradients(batch, State()))["loss"])
            gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            tuned.flow.network.zero_grad()
        one = torch.stack([each / each.norm() for each in gradients])
        cosine = ((one @ one.T).sum().item() - batches) / (batches * (batches - 1))
        print(f"| {words} | {statistics.median(losses):.3g} | {max(losses):.3g} | {cosine:.2f} |", flush=True)


def find_decided(name: str, data: Path, count: int, seed: int) -> None:
    """Print what the model makes of molecules of the data from the time on up to which they are noised: what it cannot finish
    from there it gets wrong later, and what is still the same molecule was decided before."""
    model = load(name)
    assert isinstance(model.network_settings, Equivariant)
    known = of_classes(load_geometries(data), model.network_settings, data)
    print("| noised up to t = | valid and connected | the same molecule |\n|---|---|---|")
    for i, time in enumerate(TIMES):
        index = known.draw(count, stream(seed, "data", i))
        x1, flow = known.samples[index], model.bound(known.labels[index])
        x0 = flow.project(normal(x1.shape, stream(seed, "noise", i)))
        x = sample(flow, time * x1 + (1 - time) * x0, model.sampling, stream(seed, "sampling", i), start=time)
        drawn, meant = (structures(molecules_of(each)) for each in (x, x1))
        same = sum(one.connected and one.smiles == other.smiles for one, other in zip(drawn, meant, strict=True)) / count
        print(f"| {time:g} | {shares(drawn).connected:.1%} | {same:.1%} |", flush=True)


TASKS = {"bonds": find_bonds, "composition": fit_composition, "gradients": find_gradients}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in TASKS:
        command = commands.add_parser(name)
        command.add_argument("data", type=Path)
        command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("adjoints")
    command.add_argument("recipe")
    command.add_argument("--batches", type=int, default=6)
    command.add_argument("--size", type=int, default=16, help="samples of a batch")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    command = commands.add_parser("decided")
    command.add_argument("model")
    command.add_argument("data", type=Path)
    command.add_argument("--count", type=int, default=200, help="molecules at each time")
    command.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    match given.what:
        case "adjoints":
            find_adjoints(given.recipe, given.batches, given.size, given.seed, given.set)
        case "decided":
            find_decided(given.model, given.data, given.count, given.seed)
        case task:
            TASKS[task](given.data, given.seed)


if __name__ == "__main__":
    main()
