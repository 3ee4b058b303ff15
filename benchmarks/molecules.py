"""What molecules are measured by: bonds from geometries, and energies and gradients by xTB; and methods that tune for these.

    python benchmarks/molecules.py bonds SMILES.csv    which reach of a bond finds a molecule again, by how far atoms are moved
    python benchmarks/molecules.py composition SMILES.csv    what each element adds to -E, and what is left
    python benchmarks/molecules.py gradients SMILES.csv    lengths of the gradient of -E, by how far atoms are moved
    python benchmarks/molecules.py adjoints qm9-isomers    adjoints and losses of the base, by grid and damping
    python benchmarks/molecules.py compare qm9-isomers --output runs/isomers    methods at the same network evaluations
    python benchmarks/molecules.py table runs/isomers    what they reached

SMILES.csv is a file of SMILES, such as those of QM9, of which some are drawn at random: 1,000 for energies, of others 500 of at
most seven heavy atoms.

compare trains by the recipe qm9-energy or qm9-isomers, or another one, by each method from each seed, and stops each run at the
first batch after --evaluations of the network. All have the recipe's temperature, grid and batch, and a constant learning
rate (--set); no setting was searched for. A run is a folder, and a line of rows.jsonl when it is done; the same command again
goes on, also after --time-limit seconds. xTB is called once for each sample that is drawn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from tiltflow.chemistry import bonds
from tiltflow.chemistry.atoms import ELEMENTS, NUMBERS, Molecule
from tiltflow.chemistry.embedding import rdkit
from tiltflow.chemistry.geometries import Geometries, load_geometries, made_of, read_smiles, selected
from tiltflow.chemistry.workers import Workers
from tiltflow.chemistry.xtb import Answer, Hamiltonian, Question, single_point
from tiltflow.files import append_row
from tiltflow.formatting import number
from tiltflow.methods.adjoint_matching import AdjointMatching, State
from tiltflow.models.model import load
from tiltflow.runs.checkpoint import FOLDER, checkpoints
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.runs.run import run
from tiltflow.settings import validate
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.trainer import Record

REACHES = (1.15, 1.18, 1.20, 1.22, 1.25, 1.30)
MOVES = (0.0, 0.03, 0.05, 0.08)


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


# ---- methods ----

METHODS: dict[str, Tree] = {
    "adjoint-matching": {},
    "score-as-action": {"train_timesteps": [{"count": 8}]},
    "tilt-matching": {},
    "path-reweighted": {},
}
"""Settings of each method, beside the temperature and the grid of the recipe; the recipe's own method keeps all of its own."""
ROWS = "rows.jsonl"
COLUMNS: dict[str, tuple[str, str, int]] = {
    "−E, hartree": ("reward_tuned", "reward_base", 3),
    "gain, in sd of the base": ("molecules.gain_in_std", "", 2),
    "relaxed": ("molecules.reward_relaxed_tuned", "molecules.reward_relaxed_base", 3),
    "best tenth": ("molecules.superquantile_90_tuned", "molecules.superquantile_90_base", 3),
    "connected": ("molecules.connected_tuned", "molecules.connected_base", 3),
    "different": ("molecules.unique_tuned", "molecules.unique_base", 3),
    "failed": ("failed_tuned", "failed_base", 3),
    "compositions, distance": ("molecules.composition_distance", "molecules.composition_distance_base", 3),
    "achieved tilt": ("achieved_tilt", "", 2),
    "path KL": ("path_kl", "", 2),
    "evaluations": ("network_evaluations", "", 0),
    "xTB calls": ("samples_drawn", "", 0),
    "seconds": ("seconds", "", 0),
}
"""Columns of the table: the keys of a run's summary of the tuned model and of the base, and decimal places."""


class OutOfTime(Exception):
    """The time of this program is over."""


def recipe_of(name: str, method: str, seed: int, sets: Sequence[str]) -> Recipe:
    """The recipe with this method in place of its own, whose temperature and grid it has."""
    tree = read_recipe_tree(find_recipe(name, "train"), sets)
    own = tree["method"]
    if method != own["name"]:
        shared = {key: own[key] for key in ("beta", "num_inference_steps", "shift") if key in own}
        tree["method"] = {"name": method, **shared, **METHODS[method]}
    tree["optimizer"] = tree.get("optimizer", {}) | {"lr_scheduler": "constant"}
    tree["training"] |= {"max_train_steps": 10**6, "checkpointing_steps": 10}
    return validate(Recipe, tree | {"seed": seed}, f"{name} by {method}")


def one_run(recipe: Recipe, folder: Path, budget: int, end: float) -> Tree:
    """Train until the network has been evaluated `budget` times, and evaluate; go on where it stopped. Returns the summary.

    Raises OutOfTime at the time `end`, with a checkpoint of a few steps before.
    """

    def watch(record: Record) -> bool:
        if time.monotonic() > end:
            raise OutOfTime
        return record.network_evaluations >= budget

    if checkpoints(folder / FOLDER):
        training = recipe.training.model_copy(update={"resume_from_checkpoint": "latest"})
        recipe = recipe.model_copy(update={"training": training})
    elif folder.exists():
        shutil.rmtree(folder)
    return run(recipe, folder, callbacks=[watch])


def compare(
    name: str, folder: Path, methods: Sequence[str], seeds: Sequence[int], budget: int, time_limit: float, sets: Sequence[str]
) -> None:
    """Make the runs that are missing, one after the other."""
    end = time.monotonic() + time_limit
    recipes = {(method, seed): recipe_of(name, method, seed, sets) for seed in seeds for method in methods}
    asked = {"recipe": name, "evaluations": budget, "set": list(sets)}
    done = {(row["method"], row["seed"]) for row in rows_of(folder, asked)}
    folder.mkdir(parents=True, exist_ok=True)
    for (method, seed), recipe in recipes.items():
        if (method, seed) in done:
            continue
        print(f"{method}, seed {seed}", flush=True)
        try:
            summary = one_run(recipe, folder / f"{method}-{seed}", budget, end)
        except OutOfTime:
            print("out of time: the same command goes on")
            break
        append_row(folder / ROWS, {**asked, "method": method, "seed": seed, "summary": summary})
    print_table(folder)


def rows_of(folder: Path, asked: Mapping[str, Any] | None = None) -> list[Tree]:
    """The rows of a folder. Exits with one line where they are not of what is asked for."""
    path = folder / ROWS
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for key, value in (asked or {}).items():
        if rows and rows[0][key] != value:
            raise SystemExit(f"{folder}: has runs with {key} {rows[0][key]}, not {value}; give another --output")
    return rows


def print_table(folder: Path) -> None:
    """Print a table of a folder: the base of the first run, then each method, mean and standard deviation over its seeds."""
    rows = rows_of(folder)
    if not rows:
        raise SystemExit(f"{folder}: has no run that is done")
    print("| | seeds | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 2))
    bases = [cell([value(rows[0]["summary"], base)], places) for _, base, places in COLUMNS.values()]
    print(f"| base | {rows[0]['seed']} | " + " | ".join(bases) + " |")
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method]
        cells = [cell([value(row["summary"], key) for row in of], places) for key, _, places in COLUMNS.values()]
        print(f"| {method} | {', '.join(str(row['seed']) for row in of)} | " + " | ".join(cells) + " |")


def value(summary: Tree, key: str) -> float | None:
    """A number of a summary, which does not name failures where there are none."""
    return number({"failed_tuned": 0.0, "failed_base": 0.0} | summary, key)


def cell(values: Sequence[float | None], places: int) -> str:
    """Mean ± standard deviation of the values that are known; of one the value alone."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.{places}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{places}f}{spread}"


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
    command = commands.add_parser("compare")
    command.add_argument("recipe")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    command.add_argument("--evaluations", type=int, default=1_000_000, help="of the network, in the training of each run")
    command.add_argument("--time-limit", type=float, default=float("inf"), help="seconds")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe, for all methods")
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    match given.what:
        case "adjoints":
            find_adjoints(given.recipe, given.batches, given.size, given.seed, given.set)
        case "compare":
            compare(given.recipe, given.output, given.methods, given.seeds, given.evaluations, given.time_limit, given.set)
        case "table":
            print_table(given.folder)
        case task:
            TASKS[task](given.data, given.seed)


if __name__ == "__main__":
    main()
