"""Metrics of molecules: are they valid, which are there, and what remains of their reward once a force field relaxed them."""

# Mutation tests: test_molecules_measured.py

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.chemistry.atoms import ELEMENTS, NUMBERS, Molecule, molecules_of, samples_of
from tiltflow.chemistry.embedding import rdkit
from tiltflow.chemistry.geometries import read_smiles
from tiltflow.chemistry.relaxation import Relaxed, relaxed
from tiltflow.chemistry.validity import Structure, canonical_smiles, shares, structures
from tiltflow.evaluation.distances import histogram_distance, histogram_masses, total_variation
from tiltflow.evaluation.estimates import Estimate, mean_estimate, one_hot
from tiltflow.evaluation.metrics import Better, Found, Metric, Section, Unit
from tiltflow.evaluation.molecules import are_molecules, evenly
from tiltflow.evaluation.samples import Samples, Seen
from tiltflow.evaluation.settings import Evaluation
from tiltflow.evaluation.tails import best_share
from tiltflow.evaluation.verdict import Row, distance_test, mean_test, share_test
from tiltflow.rewards.functions.checked import score
from tiltflow.rewards.functions.prompted import told

SIDES = ("base", "tuned")
MOST_RELAXED, RESAMPLES, SHOWN = 256, 400, 9
"""Molecules of each model that are relaxed, resamples of a bootstrap, and formulas that are shown by name, at most."""
TAILS = {"superquantile_90": 0.1, "superquantile_98": 0.02}


def of_both(key: str, title: str, meaning: str, better: Better = "none", unit: Unit = "") -> tuple[Metric, Metric]:
    """The metrics of a number of both models."""
    first = Metric(f"molecules.{key}_base", f"{title}, base", meaning, unit=unit, section=Section.MOLECULES)
    again = "The same for the tuned model."
    last = Metric(f"molecules.{key}_tuned", f"{title}, tuned", again, better, unit, section=Section.MOLECULES, compared=True)
    return first, last


METRICS = (
    *of_both(
        "connected",
        "Valid and connected",
        "Share of samples whose atoms are one molecule: bonds by distance, of closed shells and without charges.",
        "up",
        "share",
    ),
    *of_both("valid", "Valid", "The same, but of one molecule or of several side by side.", "up", "share"),
    *of_both("unique", "Different", "Number of different molecules over that of valid, connected samples.", "up", "share"),
    *of_both("novel", "New", "Share of the different molecules that are not in evaluation.data.", "none", "share"),
    *of_both(
        "relaxing_drop",
        "Strain",
        "Energy in kcal/mol that valid molecules set free as the force field MMFF94 relaxes them: of strange geometries more.",
        "down",
    ),
    *of_both("relaxing_rmsd", "Way to the relaxed", "Root mean square distance that their atoms move meanwhile, in Å.", "down"),
    *of_both(
        "reward_relaxed", "Reward, relaxed", "Mean reward of the relaxed molecules: what of it is no strange geometry.", "up"
    ),
    *of_both("superquantile_90", "Best tenth", "Mean reward of the best tenth of samples (superquantile at 0.9).", "up"),
    *of_both("superquantile_98", "Best fiftieth", "Mean reward of the best fiftieth of samples (superquantile at 0.98).", "up"),
    *of_both("unscored", "Without reward", "Share of samples whose reward is not finite; they are left out.", "down", "share"),
    Metric(
        "molecules.reward_std_base",
        "Spread of the reward, base",
        "Standard deviation of the base's rewards.",
        section=Section.MOLECULES,
    ),
    Metric(
        "molecules.gain_in_std",
        "Gain in spreads",
        "By how many standard deviations of the base's rewards the mean reward rose.",
        better="up",
        section=Section.MOLECULES,
        compared=True,
    ),
    Metric(
        "molecules.composition_distance",
        "Distance of compositions",
        "Total variation between the formulas of tuned samples and those under the target law. ± is its standard deviation from"
        " sample to sample, not an interval for the distance, which finite samples increase by about the floor.",
        better="down",
        section=Section.MOLECULES,
        compared=True,
    ),
    Metric(
        "molecules.composition_distance_base",
        "Distance of compositions, base",
        "The same for the base model.",
        section=Section.MOLECULES,
    ),
    Metric(
        "molecules.composition_distance_floor",
        "Distance of compositions, floor",
        "The expected distance if the tuned model follows the target law.",
        section=Section.MOLECULES,
    ),
)


def measure(seen: Seen) -> Found:
    """Measure molecules; nothing of other samples. Raises InputError if RDKit is not installed, or evaluation.data cannot be
    read."""
    if not are_molecules(seen.samples.base):
        return Found()
    samples, smiles = seen.samples, known_smiles(seen.settings)
    known = None if smiles is None else canonical_smiles(smiles)
    both = [molecules_of(x) for x in samples.both]
    found = [structures(molecules) for molecules in both]
    entries: dict[str, Any] = {}
    for i, side in enumerate(SIDES):
        numbers = of_structures(found[i], known) | of_relaxing(seen, both[i], samples.both[i].shape[1])
        numbers |= of_rewards((samples.base_rewards, samples.tuned_rewards)[i][seen.instruments.own], seen.generator)
        numbers["unscored"] = samples.left_out[i] / (len(both[i]) + samples.left_out[i])
        entries |= {sided(key, side): value for key, value in numbers.items()}
    entries |= gain(*(each[seen.instruments.own].double() for each in (samples.base_rewards, samples.tuned_rewards)))
    compositions, tests = of_compositions(both, samples, seen.generator)
    if samples.weights.unknown() is None:
        base, tuned = (torch.tensor([float(each.connected) for each in several]) for several in found)
        tests = [share_test("share of valid, connected molecules", tuned, base, samples.weights), *tests]
    return Found({"molecules": entries | compositions}, tuple(row for row in tests if row is not None))


def sided(key: str, side: str) -> str:
    """Name a number of a model: `x_error` of the base is `x_base_error`."""
    for end in ("_error", "_interval"):
        if key.endswith(end):
            return f"{key.removesuffix(end)}_{side}{end}"
    return f"{key}_{side}"


def known_smiles(settings: Evaluation) -> list[str] | None:
    """The molecules of evaluation.data, a file of SMILES; None without one. Raises InputError for a file that cannot be read,
    and if RDKit is not installed."""
    rdkit()
    return None if settings.data is None else [text for _, text in read_smiles(Path(settings.data))]


def of_structures(several: Sequence[Structure], known: set[str] | None) -> dict[str, Any]:
    """Shares of samples that are valid, connected, different and new."""
    found = shares(several, known)
    valid, connected = (
        torch.tensor([float(each) for each in flags]) for flags in zip(*((s.valid, s.connected) for s in several), strict=True)
    )
    numbers: dict[str, Any] = {**mean_estimate(valid).named("valid"), **mean_estimate(connected).named("connected")}
    return numbers | {"unique": found.unique} | ({} if found.novel is None else {"novel": found.novel})


def of_relaxing(seen: Seen, molecules: Sequence[Molecule], atoms: int) -> dict[str, Any]:
    """How far molecules are from what a force field would have, and what their rewards are there. The numbers are None where
    fewer than two are valid."""
    chosen = evenly(len(molecules), MOST_RELAXED)
    several = [(i, one) for i in chosen if (one := relaxed(molecules[i])) is not None]
    if len(several) < 2:
        return {**dict.fromkeys(("relaxing_drop", "relaxing_rmsd", "reward_relaxed")), "others_relaxed": {}}
    numbers = {
        **mean_estimate(torch.tensor([one.drop for _, one in several])).named("relaxing_drop"),
        **mean_estimate(torch.tensor([one.rmsd for _, one in several])).named("relaxing_rmsd"),
    }
    means = rewards_of(seen, several, len(molecules), atoms)
    own = means.pop(seen.instruments.own)
    others = {name: [each.value, each.standard_error] for name, each in means.items()}
    return {**numbers, **own.named("reward_relaxed"), "others_relaxed": others}


def rewards_of(seen: Seen, several: Sequence[tuple[int, Relaxed]], count: int, atoms: int) -> dict[str, Estimate]:
    """The mean rewards, by name, of relaxed molecules, each with its place among `count` samples, for which the same was asked
    for."""
    instruments, asked = seen.instruments, seen.samples.asked
    items = [asked.items[i * asked.groups // count * asked.size] for i, _ in several]
    x, found = samples_of([one.molecule for _, one in several], atoms), dict[str, Estimate]()
    for name, reward in instruments.rewards.items():
        given = reward if asked.kind == "sample" else told(reward, items)
        rewards = score(given, x, instruments.batch_size, instruments.device, "drop")
        found[name] = mean_estimate(rewards[rewards.isfinite()])
    return found


def of_rewards(rewards: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Means of the best of the rewards [n], with their standard deviation and an interval of 95 % by the bootstrap. None for a
    tail that has less than one sample."""
    found: dict[str, Any] = {}
    equal = torch.full(rewards.shape, 1 / len(rewards), dtype=torch.float64)
    again = torch.randint(len(rewards), (RESAMPLES, len(rewards)), generator=generator)
    for name, share in TAILS.items():
        if share * len(rewards) < 1:
            found[name] = None
            continue
        value, *others = (best_share(r.double(), equal, share)[0] for r in (rewards, *rewards[again]))
        means = torch.tensor(others, dtype=torch.float64)
        found |= Estimate(value, means.std().item()).named(name)
        found[f"{name}_interval"] = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return found


def gain(base: Tensor, tuned: Tensor) -> dict[str, Any]:
    """By how many standard deviations of the base's rewards [n] the mean reward rose; None where they are all equal."""
    spread, first, last = base.std().item(), mean_estimate(base), mean_estimate(tuned)
    if not spread > 0:
        return {"reward_std_base": spread, "gain_in_std": None}
    error = math.hypot(first.standard_error, last.standard_error)
    return {"reward_std_base": spread} | Estimate((last.value - first.value) / spread, error / spread).named("gain_in_std")


def of_compositions(
    both: Sequence[Sequence[Molecule]], samples: Samples, generator: torch.Generator
) -> tuple[dict[str, Any], list[Row | None]]:
    """The formulas of both models and of the target law, the distances between them, and tests: of the number of atoms of each
    element, and of the distance. Values of the target are None if it is unknown."""
    named = [[molecule.formula for molecule in molecules] for molecules in both]
    names = sorted(set(named[0]) | set(named[1]))
    base, tuned = (torch.tensor([names.index(name) for name in several]) for several in named)
    histograms = [one_hot(each, len(names)).mean(0) for each in (base, tuned)]
    weights, classes, target, error = samples.weights, len(names), None, None
    entries: dict[str, Any] = {}
    tests: list[Row | None] = []
    if weights.unknown() is None:
        members = one_hot(base, classes)
        distance, _, target = histogram_distance(tuned, base, weights, classes, generator)
        error, of_base = weights.mean(members)[1], total_variation(histograms[0], target)
        null = weights.null_distances(len(tuned), [histogram_masses(base, classes)], generator)[0]
        entries |= distance.named("composition_distance")
        entries |= {"composition_distance_base": of_base, "composition_distance_floor": null.mean().item()}
        tests += of_elements(both, samples)
        if classes > 1:
            tests.append(distance_test("total variation of the formulas", distance.value, of_base, null))
    most = [names.index(name) for name, _ in Counter(named[0] + named[1]).most_common(SHOWN)]
    columns = {"base": histograms[0], "tuned": histograms[1], "target": target, "target_error": error}
    shown: dict[str, Any] = {key: None if each is None else each[most].tolist() for key, each in columns.items()}
    return entries | {"compositions": {"formulas": [names[i] for i in most], "number": classes, **shown}}, tests


def of_elements(both: Sequence[Sequence[Molecule]], samples: Samples) -> list[Row]:
    """A test of the mean number of atoms of each element that there is, where that number varies."""
    tests = []
    for symbol, number in zip(ELEMENTS, NUMBERS, strict=True):
        base, tuned = (torch.tensor([float((one.numbers == number).sum()) for one in molecules]) for molecules in both)
        if torch.cat([base, tuned]).std() > 0:
            tests.append(mean_test(f"mean number of atoms of {symbol}", tuned, base, samples.weights))
    return tests
