"""Pretraining on molecules: which geometries a model gets, what its loss is least at, and what is written."""

from __future__ import annotations

import os
import signal
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiltflow
from tiltflow.chemistry.atoms import DIM, ELEMENTS, TYPE, molecules_of, present
from tiltflow.chemistry.geometries import Geometries, save
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError, Interrupted
from tiltflow.networks.equivariant import Equivariant, EquivariantModule
from tiltflow.pretraining.card import with_scores
from tiltflow.pretraining.loop import Progress
from tiltflow.pretraining.recipe import pretraining_of
from tiltflow.pretraining.run import run_pretraining
from tiltflow.pretraining.tasks import molecules
from tiltflow.pretraining.tasks.molecules import Data, along_bonds, draw_times, molecules_loss, of_classes, total_variation
from tiltflow.streams import new_network, stream

SMALL = {"features": 16, "pair_features": 12, "vectors": 2, "heads": 2, "layers": 2}
WATER = ([8, 1, 1], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
METHANE = ([6, 1, 1, 1, 1], [[0, 0, 0], [0.63, 0.63, 0.63], [-0.63, -0.63, 0.63], [-0.63, 0.63, -0.63], [0.63, -0.63, -0.63]])
FORMALDEHYDE = ([1, 6, 8, 1], [[0.54, 0.93, 0], [0, 0, 0], [-1.2, 0, 0], [0.54, -0.93, 0]])
FLUORINE = ([9, 9], [[0.0, 0, 0], [1.42, 0, 0]])
HYPOFLUOROUS = ([1, 8, 9], [[0, 0.9, 0], [0, 0, 0], [1.4, -0.2, 0]])


def geometries(*molecules: tuple[str, Any]) -> Geometries:
    atoms = max(len(numbers) for _, (numbers, _) in molecules)
    numbers, positions = np.zeros((len(molecules), atoms), np.int8), np.zeros((len(molecules), atoms, 3), np.float32)
    for i, (_, (own, places)) in enumerate(molecules):
        numbers[i, : len(own)], positions[i, : len(own)] = own, np.array(places) - np.mean(places, 0)
    return Geometries(numbers, positions, np.array([name for name, _ in molecules]))


SOME = (("O", WATER), ("O", WATER), ("O", WATER), ("C", METHANE), ("FF", FLUORINE), ("C=O", FORMALDEHYDE), ("OF", HYPOFLUOROUS))


def data(*classes: str) -> Data:
    return of_classes(geometries(*SOME), Equivariant(classes=classes, **SMALL), Path("some.npz"))


def test_a_model_gets_the_molecules_that_its_classes_ask_for_with_their_atoms_in_order() -> None:
    found = data("5 atoms", "3 atoms", "3 atoms", "CH2O")
    assert found.smiles == ("O", "C", "C=O", "OF")
    assert found.labels.tolist() == [1, 1, 1, 0, 3, 1]
    assert found.samples.shape == (6, 5, DIM + len(ELEMENTS))
    written = {each.formula: each for each in molecules_of(found.samples)}
    assert written["CH2O"].numbers.tolist() == [6, 1, 1, 8]  # the order of the formula
    places = written["CH2O"].positions
    assert np.linalg.norm(places[[1, 2, 3]] - places[0], axis=1) == pytest.approx([1.075, 1.075, 1.2], abs=0.01)
    assert found.samples[..., :DIM].sum(1).abs().max() < 1e-6


def test_molecules_are_equally_likely_whatever_the_number_of_their_geometries() -> None:
    found = data("3 atoms")
    index = found.draw(20_000, stream(0, "test"))
    counts = index.bincount(minlength=4) / 20_000
    # three geometries of water with a sixth each, one of the other: 4.5 standard errors
    assert (counts - torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2])).abs().max() < 4.5 * (0.25 / 20_000) ** 0.5


def test_a_class_that_the_data_lack_is_one_line() -> None:
    with pytest.raises(InputError, match=r"some.npz: has no molecule of 7 atoms, which network.classes asks for"):
        data("3 atoms", "7 atoms")


def test_the_loss_of_a_network_that_adds_nothing() -> None:
    """With F = 0 the squared error is that of the best multiple of x_t, in closed form; types are told by their own noise."""
    classes = ("3 atoms",)
    network, found = new_network(Equivariant(classes=classes, scale=0.7, **SMALL), 0), data(*classes)
    assert isinstance(network, EquivariantModule)
    x1, n, many = found.samples[:1], 3, 40_000
    labels, generator = torch.zeros(many, dtype=torch.long), stream(0, "loss")

    def loss(weight: float) -> float:
        with torch.no_grad():
            t = torch.rand(many, generator=generator)
            return float(molecules_loss(network, x1.expand(many, -1, -1), labels, t, generator, weight))

    s, size = 0.7, float(x1[..., :DIM].square().sum()) / (DIM * n)
    t = (np.arange(20_000) + 0.5) / 20_000
    v = t**2 * s**2 + (1 - t) ** 2
    skip, out = t * s**2 / v, (1 - t) * s / np.sqrt(v)
    expected = (size * (1 - skip * t) ** 2 + (1 - 1 / n) * (skip * (1 - t)) ** 2) / out**2
    without = loss(1e-12)
    assert without == pytest.approx(expected.mean(), rel=0.02)
    # an atom's type, by Bayes' rule with equal priors, of other random numbers
    random = np.random.default_rng(0)
    u = random.random(100_000)[:, None]
    noisy = u * TYPE * np.eye(len(ELEMENTS))[0] + (1 - u) * random.standard_normal((100_000, len(ELEMENTS)))
    logits = -((noisy[:, None] - u[..., None] * TYPE * np.eye(len(ELEMENTS))) ** 2).sum(2) / (
        2 * np.maximum(1 - u, 0.05 * TYPE) ** 2
    )
    logits -= logits.max(1, keepdims=True)
    unsure = np.log(np.exp(logits).sum(1)) - logits[:, 0]
    assert loss(1.0) - without == pytest.approx(unsure.mean(), abs=0.02)


def test_the_error_along_bonds_is_that_of_their_lengths() -> None:
    """Against squared differences of lengths, of small errors, in molecules that are written by hand."""
    positions = torch.tensor(
        [[[0.0, 0, 0], [1.2, 0, 0], [1.2, 1.5, 0], [0.5, 0.5, 0]], [[0.0, 0, 0], [0, 0, 1.0], [0, 0, 2.5], [0, 0, 3.9]]]
    )
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]])[..., None]  # one bond and one; three in a row
    positions, small = positions.double(), 1e-5 * torch.randn(2, 4, DIM, generator=stream(0, "test"), dtype=torch.float64)
    bonds = [[(0, 1), (1, 2)], [(0, 1), (1, 2), (2, 3)]]
    expected = [
        sum(((after[i] - after[j]).norm() - (before[i] - before[j]).norm()) ** 2 for i, j in each)
        for before, after, each in zip(positions, positions + small, bonds, strict=True)
    ]
    assert along_bonds(small, positions, mask) == pytest.approx(torch.stack(expected), rel=1e-3)


def test_the_loss_has_the_error_along_the_bonds_of_x_t() -> None:
    """Of a network that adds nothing, whose errors are those of a multiple of x_t: summed bond by bond."""
    classes, s, t = ("4 atoms",), 0.7, 0.9
    network, found = new_network(Equivariant(classes=classes, scale=s, **SMALL), 0), data(*classes)
    assert isinstance(network, EquivariantModule)
    x1, labels, times = found.samples[:1], torch.zeros(1, dtype=torch.long), torch.tensor([t])

    def loss(bond_weight: float) -> float:
        with torch.no_grad():
            return float(molecules_loss(network, x1, labels, times, stream(0, "loss"), 1.0, None, bond_weight))

    x = t * x1 + (1 - t) * network.project(torch.randn(x1.shape, generator=stream(0, "loss")), labels)
    at, v = x[0, :, :DIM].double(), (t * s) ** 2 + (1 - t) ** 2
    wrong = (t * s**2 / v * at - x1[0, :, :DIM].double()) / ((1 - t) * s / v**0.5)
    expected = 0.0
    for i, j in combinations(range(4), 2):
        line = at[i] - at[j]
        expected += float((wrong[i] - wrong[j]) @ line / line.norm()) ** 2 * bool(line.norm() < 1.7 * t)
    assert loss(5.0) - loss(0.0) == pytest.approx(5 * expected / 12, rel=1e-3)


@pytest.mark.parametrize(("density", "share"), [((1.0, 0.65), 0.2), ((3.0, 0.8), 0.2), ((3.5, 0.9), 0.0)])
def test_times_have_the_density_that_is_said(density: tuple[float, float], share: float) -> None:
    t = draw_times(100_000, stream(0, "times"), *density, share).double()
    for edge in (0.1, 0.5, 0.9):
        normal = torch.distributions.Normal(*density).cdf(torch.tensor(edge / (1 - edge)).log())
        expected = share * edge + (1 - share) * float(normal)
        assert float((t < edge).double().mean()) == pytest.approx(expected, abs=4.5 * 0.5 / 100_000**0.5)


def test_rows_that_are_kept_have_the_predictions_of_another_network_as_targets() -> None:
    settings = Equivariant(classes=("3 atoms", "5 atoms"), scale=0.7, **SMALL)
    found = of_classes(geometries(*SOME), settings, Path("some.npz"))
    network, other = (new_network(settings, seed) for seed in (0, 1))
    assert isinstance(network, EquivariantModule)
    assert isinstance(other, EquivariantModule)
    for seed, each in enumerate((network, other)):  # fresh ones add nothing
        for weight in each.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=stream(seed, "weights"))
    index = torch.arange(len(found.samples)).repeat(4)
    x1, labels, t = found.samples[index], found.labels[index], torch.linspace(0.05, 0.95, len(index))
    everywhere, nowhere = torch.ones(len(t), dtype=torch.bool), torch.zeros(len(t), dtype=torch.bool)

    def loss(network: EquivariantModule, data: torch.Tensor, kept: Any, bond_weight: float = 0.0) -> torch.Tensor:
        return molecules_loss(network, data, labels, t, stream(0, "loss"), 1.0, kept, bond_weight)

    def steepest(network: EquivariantModule, kept: Any, bond_weight: float = 0.0) -> float:
        gradients = torch.autograd.grad(loss(network, x1, kept, bond_weight), [*network.parameters()], allow_unused=True)
        return max(float(each.abs().max()) for each in gradients if each is not None)

    assert loss(network, x1, (other, nowhere)) == loss(network, x1, None)
    assert steepest(other, (other, everywhere)) < 1e-5  # least at its own predictions, of positions and of types
    assert steepest(other, (other, everywhere), 10.0) < 1e-5  # whatever the weight of bonds
    assert steepest(network, (other, everywhere)) > 1e-2
    assert steepest(other, None) > 1e-2
    early = t < 0.5
    halves = loss(network, x1, (other, early)) + loss(network, x1, (other, ~early))
    assert torch.allclose(halves, loss(network, x1, None) + loss(network, x1, (other, everywhere)), rtol=1e-5)


def recipe(**changes: Any) -> Any:
    tree = {
        "task": "molecules",
        "network": {"name": "equivariant", "classes": ["3 atoms", "CH2O"], "scale": 0.7, **SMALL},
        "training": {"max_train_steps": 250, "train_batch_size": 32, "learning_rate": 5e-3, "lr_warmup_steps": 10},
        "sampling": {"num_inference_steps": 30},
        "num_samples": 0,
    }
    return pretraining_of({**tree, **changes}, "test")


def test_a_model_learns_molecules_without_rdkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)  # an import of it would fail
    save(geometries(*SOME), tmp_path / "some.npz")
    losses: list[float] = []
    run_pretraining(recipe(), tmp_path / "some.npz", tmp_path / "model", name="test", watch=lambda p: losses.append(p.loss))
    assert np.mean(losses[-50:]) < 0.8 * np.mean(losses[:10])
    model = tiltflow.load(tmp_path / "model")
    molecules = molecules_of(model.sample(64, labels="3 atoms", seed=1))
    assert {len(each) for each in molecules} == {3}
    pairs = np.triu_indices(3, 1)
    nearest = [np.linalg.norm(m.positions[:, None] - m.positions, axis=2)[pairs].min() for m in molecules]
    assert np.median(nearest) == pytest.approx(0.93, abs=0.15)  # 0.96 in water, 0.9 in the other; of noise, 1.5
    assert {each.formula for each in molecules_of(model.sample(4, labels="CH2O"))} == {"CH2O"}
    text = (tmp_path / "model" / "README.md").read_text()
    assert "3 molecules in 5 geometries" in text
    assert "250 steps of 32 samples" in text


def test_the_recipe_says_which_times_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(geometries(*SOME), tmp_path / "some.npz")
    seen: list[torch.Tensor] = []

    def loss(network: Any, x1: Any, labels: Any, t: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(t)
        return molecules_loss(network, x1, labels, t, *others)

    monkeypatch.setattr("tiltflow.pretraining.tasks.molecules.molecules_loss", loss)
    shares = []
    for changes in ({}, {"logit_mean": 3.0, "logit_std": 0.1}):
        seen.clear()
        trained(tmp_path, f"model{len(shares)}", steps=10, training={"train_batch_size": 20}, **changes)
        shares.append(float((torch.cat(seen) > 0.9).double().mean()))
    assert shares[0] < 0.15
    assert 0.8 <= shares[1] <= 0.86  # all that are not uniform, and a few of a fifth that are


def test_molecules_of_all_sizes_have_uniform_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(geometries(*SOME), tmp_path / "some.npz")
    early: dict[int, list[bool]] = {3: [], 5: []}

    def loss(network: Any, x1: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, *others: Any) -> torch.Tensor:
        for count, each in zip(present(x1).sum(1).tolist(), t.tolist(), strict=True):
            early[count].append(each < 0.5)
        return t.mean()

    monkeypatch.setattr(molecules, "molecules_loss", loss)
    network = {"name": "equivariant", "classes": ["3 atoms", "5 atoms"], **SMALL}
    changes = {"network": network, "logit_mean": 6.0, "logit_std": 0.1, "uniform_share": 0.5}
    task = recipe(training={"train_batch_size": 40}, **changes).prepare(tmp_path / "some.npz", "cpu")
    (stage,) = task.stages()
    for _ in range(100):
        stage.loss()
    for found in early.values():  # half of a half: 4.5 standard errors
        assert np.mean(found) == pytest.approx(0.25, abs=4.5 * (0.25 * 0.75 / len(found)) ** 0.5)


def test_a_recipe_keeps_a_model_before_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(geometries(*SOME), tmp_path / "some.npz")
    first = trained(tmp_path, "first", steps=5)
    seen: list[bool] = []

    def loss(
        network: Any, x1: Any, labels: Any, t: torch.Tensor, generator: Any, weight: Any, kept: Any, bonds: float
    ) -> torch.Tensor:
        assert torch.equal(kept[1], t < 0.7)
        assert bonds == 2.5
        assert all(torch.equal(weight, first[key]) for key, weight in kept[0].state_dict().items())  # at each step
        seen.append(bool(kept[1].any()))
        return molecules_loss(network, x1, labels, t, generator, weight, kept, bonds)

    monkeypatch.setattr(molecules, "molecules_loss", loss)
    changes = {"init_from": str(tmp_path / "first"), "keep_before": 0.7, "bond_weight": 2.5, "uniform_share": 1.0}
    trained(tmp_path, "second", steps=5, **changes)
    assert any(seen)
    with pytest.raises(InputError, match="keep_before: needs a model to keep, in init_from"):
        recipe(keep_before=0.7)


def test_training_ends_when_its_time_is_over(tmp_path: Path) -> None:
    save(geometries(*SOME), tmp_path / "some.npz")
    limited = recipe(training={"max_train_steps": 10**6, "max_train_seconds": 0.5, "train_batch_size": 4, "lr_warmup_steps": 1})
    seconds: list[float] = []
    run_pretraining(limited, tmp_path / "some.npz", tmp_path / "model", name="test", watch=lambda p: seconds.append(p.seconds))
    assert all(each - seconds[0] < 0.5 + 0.2 for each in seconds[:-1])  # the optimizer is made before
    assert f"{len(seconds):,} steps of 4 samples" in (tmp_path / "model" / "README.md").read_text()


def trained(tmp_path: Path, name: str, steps: int = 1, **changes: Any) -> dict[str, torch.Tensor]:
    training = {"max_train_steps": steps, "train_batch_size": 16, "lr_warmup_steps": 0, **changes.pop("training", {})}
    run_pretraining(recipe(training=training, **changes), tmp_path / "some.npz", tmp_path / name, name="test")
    return dict(tiltflow.load(tmp_path / name).flow.network.state_dict())


def test_training_begins_with_the_weights_of_another_model(tmp_path: Path) -> None:
    save(geometries(*SOME), tmp_path / "some.npz")
    first = trained(tmp_path, "first", steps=30)
    still = {"learning_rate": 1e-12}
    other = {"name": "equivariant", "classes": ["5 atoms"], "scale": 0.9, **SMALL}
    second = trained(tmp_path, "second", init_from=str(tmp_path / "first"), network=other, training=still)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], rtol=0, atol=1e-9) for key in first)
    assert not torch.allclose(first["types.weight"], trained(tmp_path, "fresh", training=still)["types.weight"], atol=1e-3)
    assert "Training began with the weights of `first`." in (tmp_path / "second" / "README.md").read_text()
    with pytest.raises(InputError, match="must have the recipe's network, but for its classes, scale and even_valences"):
        trained(tmp_path, "third", init_from=str(tmp_path / "first"), network={**other, "layers": 3})
    grown = trained(tmp_path, "grown", init_from=str(tmp_path / "first"), network={**other, "triangles": 3}, training=still)
    assert all(torch.allclose(first[key], grown[key], rtol=0, atol=1e-9) for key in first)
    added = {key: weight.abs().max() for key, weight in grown.items() if key not in first}
    assert added
    assert all((largest < 1e-9) == ("sides" not in key) for key, largest in added.items())
    with pytest.raises(InputError, match="but for its classes, scale and even_valences, and for triangles where it has none"):
        trained(tmp_path, "fourth", init_from=str(tmp_path / "grown"), network=other)
    with pytest.raises(InputError, match="there is no model 'digit-flow', did you mean 'digits-flow'"):
        trained(tmp_path, "third", init_from="digit-flow")
    assert not (tmp_path / "third").exists() or not any((tmp_path / "third").glob("*.safetensors"))


def test_a_signal_ends_the_training_and_keeps_the_model(tmp_path: Path) -> None:
    save(geometries(*SOME), tmp_path / "some.npz")

    def watch(progress: Progress) -> None:
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by signal 15 after 5 steps; the model is in") as stopped:
        run_pretraining(recipe(), tmp_path / "some.npz", tmp_path / "model", name="test", watch=watch)
    assert stopped.value.signal == signal.SIGTERM
    assert "5 steps of 32 samples, stopped early" in (tmp_path / "model" / "README.md").read_text()
    network = tiltflow.load(tmp_path / "model").flow.network
    fresh = new_network(recipe().network, 0)
    assert not torch.equal(network.state_dict()["types.weight"], fresh.state_dict()["types.weight"])


def test_a_batch_is_computed_in_parts_by_the_number_of_atoms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No atom is cut off, and the loss is the mean over all molecules though the last part has fewer."""
    save(geometries(*SOME), tmp_path / "some.npz")
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(network: Any, x1: torch.Tensor, labels: torch.Tensor, *others: Any) -> torch.Tensor:
        parts.append((x1, labels))
        return labels.double().mean()

    monkeypatch.setattr(molecules, "molecules_loss", loss)
    network = {"name": "equivariant", "classes": ["3 atoms", "CH2O", "5 atoms"], **SMALL}
    task = recipe(network=network, training={"train_batch_size": 18}).prepare(tmp_path / "some.npz", "cpu")
    (stage,) = task.stages()
    found = float(stage.loss())
    assert found == pytest.approx(float(torch.cat([labels for _, labels in parts]).double().mean()))
    assert [len(labels) for _, labels in parts] == [5, 5, 5, 3]
    assert (torch.cat([labels for _, labels in parts]).diff() >= 0).all()
    for x1, labels in parts:
        sizes = torch.tensor([3, 4, 5])[labels]
        assert present(x1).sum(1).tolist() == sizes.tolist()
        assert x1.shape[1] == sizes.max()


def test_scores_come_later_on_another_machine(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    save(geometries(*SOME), tmp_path / "some.npz")
    place, few = tmp_path / "model", recipe(training={"max_train_steps": 2, "train_batch_size": 4})
    run_pretraining(few, tmp_path / "some.npz", place, name="test")
    (tmp_path / "test.yaml").write_text(
        "task: molecules\nnetwork: {name: equivariant, classes: [3 atoms, CH2O], scale: 0.7, features: 16, pair_features: 12,"
        " vectors: 2, heads: 2, layers: 2}\nsampling: {num_inference_steps: 30}\nnum_samples: 40\n"
    )
    before = (place / "README.md").read_text()
    command = ["pretrain", str(tmp_path / "test.yaml"), "--data", str(tmp_path / "some.npz"), "--output", str(place), "--score"]
    for _ in range(2):
        result = CliRunner().invoke(app, [*command, "--quiet"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    after = (place / "README.md").read_text()
    assert before.split("| training_loss")[0] == after.split("| training_loss")[0]
    assert after.count("| connected |") == after.count("| training_loss |") == 1
    assert "| connected_data | 1 |" in after
    result = CliRunner().invoke(app, [*command, "--set", "network.layers=3"])
    assert isinstance(result.exception, InputError)
    assert "has another network than the recipe" in str(result.exception)


def test_a_card_without_a_table_is_one_line() -> None:
    with pytest.raises(InputError, match="no table of scores"):
        with_scores("# A model", {"valid": 1.0}, "README.md")


def test_distances_of_compositions() -> None:
    assert total_variation({"H2O": 2, "CH4": 2}, {"H2O": 2, "CH4": 2}) == 0
    assert total_variation({"H2O": 4}, {"CH4": 4}) == 1
    assert total_variation({"H2O": 3, "CH4": 1}, {"H2O": 1, "CH4": 1, "H2": 2}) == 0.5
