"""What molecules are measured by: bonds from geometries, and energies and gradients by xTB.

    python benchmarks/molecules.py bonds SMILES.csv    which reach of a bond finds a molecule again, by how far atoms are moved
    python benchmarks/molecules.py composition SMILES.csv    what each element adds to -E, and what is left
    python benchmarks/molecules.py gradients SMILES.csv    lengths of the gradient of -E, by how far atoms are moved
    python benchmarks/molecules.py adjoints qm9-isomers    adjoints and losses of the base, by grid and damping
    python benchmarks/molecules.py decided MODEL GEOMETRIES.npz    what becomes of data that are noised up to a time
    python benchmarks/molecules.py spread GEOMETRIES.npz    means and standard deviations of -E and of the dipole, of 600
    python benchmarks/molecules.py relaxed MODEL GEOMETRIES.npz --output own.npz    what to finish a model on: relaxed samples
    python benchmarks/molecules.py tuned --output runs/molecules    train the recipes by Tilt Matching; goes on when run again

SMILES.csv is a file of SMILES, such as those of QM9, of which some are drawn at random: 1,000 for energies, of others 500 of at
most seven heavy atoms. Methods that tune for energies are compared by `tiltflow compare --recipes qm9-isomers`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from tiltflow.chemistry import bonds
from tiltflow.chemistry.atoms import ELEMENTS, NUMBERS, Molecule, molecules_of, samples_of
from tiltflow.chemistry.embedding import rdkit
from tiltflow.chemistry.geometries import Geometries, load_geometries, made_of, padded, read_smiles, save, selected
from tiltflow.chemistry.relaxation import Relaxed, relaxed
from tiltflow.chemistry.validity import shares, structures
from tiltflow.chemistry.workers import Workers
from tiltflow.chemistry.xtb import Answer, Hamiltonian, Question, single_point
from tiltflow.formatting import decimal, percent
from tiltflow.methods.adjoint_matching import AdjointMatching, State
from tiltflow.models.model import load
from tiltflow.networks.equivariant import Equivariant
from tiltflow.pretraining.tasks.molecules import of_classes
from tiltflow.rewards.dipole import Dipole
from tiltflow.rewards.xtb_energy import XtbEnergy
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.samplers.rollout import sample
from tiltflow.settings import validate
from tiltflow.streams import normal, stream
from tiltflow.training.batch import Batch

REACHES = (1.15, 1.18, 1.20, 1.22, 1.25, 1.30)
MOVES = (0.0, 0.03, 0.05, 0.08)
TUNED = {"qm9-energy-tilt-matching": "xtb-energy", "qm9-isomers-tilt-matching": "xtb-energy", "qm9-dipole": "dipole"}
"""Recipes, and the reward that their table shows: what is not a price of something else."""
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


def find_spread(data: Path, seed: int = 0) -> None:
    """Print what data have of the rewards that their models are tuned by."""
    made = load_geometries(data)
    molecules = [made.molecules()[i] for i in np.random.default_rng(seed).permutation(len(made))[:600]]
    x = samples_of(molecules, max(map(len, molecules)))
    print("| reward | mean | sd | largest |\n|---|---|---|---|")
    for reward in (XtbEnergy(), Dipole()):
        values = reward.build()(x).double()
        print(f"| `{reward.name}` | {values.mean():.4f} | {values.std():.4f} | {values.max():.4f} |")


def relax_samples(name: str, data: Path, count: int, path: Path, seed: int) -> None:
    """Write geometries to finish a model on: its own molecules, which are samples that are valid, each in its nearest minimum
    of MMFF94, and twice as many of the data; those with rare bonds more than once."""
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # relaxing mends what is lost
        drawn = molecules_of(load(name).sample(count, seed=seed).float())
    found = [each.molecule for each in Workers().map(relaxed, drawn) if isinstance(each, Relaxed)]
    own = [(each.smiles, one) for one, each in zip(found, structures(found), strict=True) if each.connected]
    made = load_geometries(data)
    molecules, some = made.molecules(), np.random.default_rng(seed).permutation(len(made))[: 2 * len(own)]
    kept = own + [(str(made.smiles[i]), molecules[i]) for i in some]
    often = [times_of(smiles, own=i < len(own)) for i, (smiles, _) in enumerate(kept)]
    rounds = [kept[i] for time in range(max(often)) for i in range(len(kept)) if often[i] > time]
    save(padded([(smiles, one.numbers, one.positions - one.positions.mean(0)) for smiles, one in rounds]), path)
    print(f"{len(rounds):,} geometries in {path}")


def times_of(smiles: str, *, own: bool) -> int:
    """How often a molecule is among those that a model is finished on: twice with a multiple bond between C and C or N, of
    which there are few, and if it is the model's own three times; then three times as often with a double one, which are taken
    for aromatic ones."""
    molecule, times = rdkit().MolFromSmiles(smiles), 1
    for kind, factor in (("[#6]=,#[#6,#7]", 2 + own), ("[#6]=[#6,#7]", 3)):
        times *= factor if molecule.HasSubstructMatch(rdkit().MolFromSmarts(kind)) else 1
    return times


TASKS = {"bonds": find_bonds, "composition": fit_composition, "gradients": find_gradients, "spread": find_spread}


def find_tuned(root: Path, recipes: Sequence[str], seeds: Sequence[int], settings: Sequence[str]) -> None:
    """Train each recipe with each seed, if that is not done, and print a table, with a row of means for each recipe."""
    for seed in seeds:
        for recipe in recipes:
            if not (root / f"{recipe}-{seed}" / "summary.json").exists():
                changes = [word for each in (f"seed={seed}", *settings) for word in ("--set", each)]
                words = ["tiltflow", "train", recipe, "--output", str(root / f"{recipe}-{seed}"), *changes, "--resume"]
                print(" ".join(words), flush=True)
                if code := subprocess.run([sys.executable, "-m", *words], stdout=subprocess.DEVNULL).returncode:
                    raise SystemExit(code)  # it has said why
    heads = (
        "recipe",
        "seed",
        "samples",
        "base",
        "tuned",
        "gain in sd",
        "valid and connected",
        "different",
        "relaxed",
        "path KL",
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for recipe in recipes:
        found = [json.loads((root / f"{recipe}-{seed}" / "summary.json").read_text()) for seed in seeds]
        numbers = [numbers_of(each, TUNED[recipe]) for each in found]
        for seed, each in zip(seeds, numbers, strict=True):
            print(f"| `{recipe}` | {seed} | {' | '.join(cells_of(each))} |")
        if len(numbers) > 1:
            print(f"| `{recipe}` | mean of {len(numbers)} | {' | '.join(cells_of(mean_of(numbers)))} |")


def numbers_of(summary: Mapping[str, Any], reward: str) -> dict[str, float]:
    """What the table says of a run: its reward, shares of molecules and the path KL, with standard errors."""
    (base, tuned), molecules, count = summary["table"], summary["molecules"], summary["num_samples"]
    spread = base[f"{reward}_error"] * math.sqrt(count)
    found = {"count": count, "path_kl": summary["path_kl"]}
    for side, row in (("base", base), ("tuned", tuned)):
        of_own = [molecules[f"reward_relaxed_{side}"], molecules[f"reward_relaxed_{side}_error"]]
        relaxed = molecules.get(f"others_relaxed_{side}", {}).get(reward, of_own)
        known = {"reward": [row[reward], row[f"{reward}_error"]], "relaxed": relaxed}
        known["valid"] = [molecules[f"connected_{side}"], molecules[f"connected_{side}_error"]]
        found |= {
            f"{key}_{side}{end}": value for key, pair in known.items() for end, value in zip(("", "_error"), pair, strict=True)
        }
        found[f"different_{side}"] = molecules[f"unique_{side}"]
    error = math.hypot(base[f"{reward}_error"], tuned[f"{reward}_error"])
    return found | {"gain": (tuned[reward] - base[reward]) / spread, "gain_error": error / spread}


def mean_of(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over runs of other seeds, and their standard errors by those of the runs, which are of samples alone."""
    found = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    return found | {key: math.sqrt(sum(run[key] ** 2 for run in runs)) / len(runs) for key in runs[0] if key.endswith("_error")}


def cells_of(numbers: Mapping[str, float]) -> list[str]:
    """The cells of a run or of a mean."""
    reward = [decimal(numbers[f"reward_{side}"], numbers[f"reward_{side}_error"]) for side in ("base", "tuned")]
    relaxed = (
        decimal(numbers["relaxed_base"], numbers["relaxed_base_error"]),
        decimal(numbers["relaxed_tuned"], numbers["relaxed_tuned_error"]),
    )
    valid = [percent(numbers[f"valid_{side}"], numbers[f"valid_{side}_error"]) for side in ("base", "tuned")]
    return [
        f"{numbers['count']:.0f}",
        *reward,
        decimal(numbers["gain"], numbers["gain_error"]),
        " to ".join(valid),
        " to ".join(percent(numbers[f"different_{side}"]) for side in ("base", "tuned")),
        " to ".join(relaxed),
        f"{numbers['path_kl']:.1f}",
    ]


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
    command = commands.add_parser("relaxed")
    command.add_argument("model")
    command.add_argument("data", type=Path)
    command.add_argument("--count", type=int, default=3000, help="samples that are drawn")
    command.add_argument("--output", type=Path, required=True, help=".npz file of geometries")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("tuned")
    command.add_argument("--output", type=Path, required=True, help="folder of the runs")
    command.add_argument("--recipes", nargs="+", default=list(TUNED), choices=list(TUNED))
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override the recipes")
    given = parser.parse_args(arguments)
    match given.what:
        case "tuned":
            find_tuned(given.output, given.recipes, given.seeds, given.set)
        case "adjoints":
            find_adjoints(given.recipe, given.batches, given.size, given.seed, given.set)
        case "decided":
            find_decided(given.model, given.data, given.count, given.seed)
        case "relaxed":
            relax_samples(given.model, given.data, given.count, given.output, given.seed)
        case task:
            TASKS[task](given.data, given.seed)


if __name__ == "__main__":
    main()
