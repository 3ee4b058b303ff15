"""The network on molecules: its symmetries, and a model whose noise lies in the space of centred molecules."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltflow.chemistry.atoms import DIM, ELEMENTS, NUMBERS, TYPE, VALENCES, molecules_of
from tiltflow.chemistry.composition import asked_of
from tiltflow.conditions import Item
from tiltflow.control.adjoint import lean_adjoint
from tiltflow.control.objective import Objective
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models.model import Model, load
from tiltflow.networks.equivariant import Equivariant, EquivariantModule, Triangles, coefficients, log_even
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import validate
from tiltflow.streams import new_network, normal, stream

SMALL = {"features": 12, "pair_features": 8, "vectors": 3, "heads": 2, "layers": 2, "triangles": 3, "even_valences": True}
CLASSES = ("5 atoms", "3 atoms", "CH2O")
CHANNELS = DIM + len(ELEMENTS)


def network(classes: tuple[str, ...] = CLASSES, seed: int = 0) -> EquivariantModule:
    """A small network, all of whose weights are at random: those that begin with zeros too."""
    module = new_network(Equivariant(classes=classes, **SMALL), seed).double()
    generator = stream(seed, "weights of a test")
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    assert isinstance(module, EquivariantModule)
    return module.requires_grad_(False).eval()


def model(**options: Any) -> Model:
    module = network(**options)
    settings = Equivariant(classes=options.get("classes", CLASSES), **SMALL)
    flow = Flow(module, "x1", projection=module.project)
    return Model(flow, (settings.atoms, CHANNELS), network_settings=settings, class_names=settings.classes)


def states(count: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(states with anything in all channels, times, labels of all classes)."""
    generator = stream(seed, "states")
    labels = torch.arange(count) % len(CLASSES)
    return normal((count, 5, CHANNELS), generator, torch.float64), torch.rand(count, generator=generator).double(), labels


def turn(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.cat([x[..., :DIM] @ matrix.T, x[..., DIM:]], -1)


def orthogonal(seed: int) -> Tensor:
    """A matrix drawn evenly from rotations and reflections."""
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=stream(seed, "turn"), dtype=torch.float64))
    return q * r.diagonal().sign()


def test_the_prediction_turns_with_the_molecule_and_does_not_see_where_it_is() -> None:
    module, (x, t, labels) = network(), states(9)
    expected = module(x, t, labels)
    signs = set()
    for seed in range(4):
        matrix = orthogonal(seed)
        signs.add(round(float(torch.det(matrix))))
        torch.testing.assert_close(module(turn(x, matrix), t, labels), turn(expected, matrix), rtol=0, atol=1e-10)
    assert signs == {-1, 1}
    moved = x.clone()
    moved[..., :DIM] += torch.tensor([3.0, -1.0, 7.0])
    torch.testing.assert_close(module(moved, t, labels), expected, rtol=0, atol=1e-9)
    assert (expected[:, :3, :DIM].abs().amax((1, 2)) > 1e-2).all()
    assert (module(2 * x, t, labels) - expected).abs().max() > 1e-2


def test_the_prediction_is_permuted_with_the_atoms() -> None:
    module, (x, t, _) = network(), states(9)
    labels = torch.zeros(9, dtype=torch.long)  # all five atoms, of free types
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(module(x[:, order], t, labels), module(x, t, labels)[:, order], rtol=0, atol=1e-12)
    # of given types, those of the same element: CH2O has two hydrogens
    labels, order = torch.full((9,), 2), torch.tensor([0, 2, 1, 3, 4])
    torch.testing.assert_close(module(x[:, order], t, labels), module(x, t, labels)[:, order], rtol=0, atol=1e-12)
    assert (module(x[:, [1, 0, 2, 3, 4]], t, labels)[:, [1, 0, 2, 3, 4]] - module(x, t, labels)).abs().max() > 1e-3


def test_what_is_not_of_the_molecule_is_neither_seen_nor_predicted() -> None:
    module, (x, t, labels) = network(), states(9)
    expected = module(x, t, labels)
    torch.testing.assert_close(module(torch.where(module.present[labels] > 0, x, 100 * x), t, labels), expected)
    assert (expected * (1 - module.present[labels])).abs().max() == 0
    assert expected[..., :DIM].sum(1).abs().max() < 1e-12
    torch.testing.assert_close(expected[..., DIM:].sum(-1), TYPE * module.present[labels, :, 0].double())
    given = labels == 2
    one_hot = torch.zeros(5, len(ELEMENTS), dtype=torch.float64)
    one_hot[range(4), [1, 0, 0, 3]] = TYPE
    torch.testing.assert_close(expected[given][..., DIM:], one_hot.expand(3, -1, -1), rtol=0, atol=0)


def test_rows_after_the_atoms_of_all_molecules_may_be_left_out() -> None:
    module, (x, t, _) = network(), states(9)
    for label, atoms in ((1, 3), (2, 4)):
        labels = torch.full((9,), label)
        for short, whole in zip(module.predict(x[:, :atoms], t, labels), module.predict(x, t, labels), strict=True):
            torch.testing.assert_close(short, whole[:, :atoms], rtol=0, atol=1e-12)


def test_noise_is_projected_orthogonally() -> None:
    module, (x, _, labels) = network(), states(9)
    y = normal(x.shape, stream(2, "states"), torch.float64)
    once = module.project(x, labels)
    torch.testing.assert_close(module.project(once, labels), once)
    torch.testing.assert_close((once * y).sum((1, 2)), (x * module.project(y, labels)).sum((1, 2)))
    # trace of P: 3 (n - 1) coordinates, and the types where they are free
    columns = torch.eye(5 * CHANNELS, dtype=torch.float64).reshape(-1, 5, CHANNELS)
    for label, free in enumerate((3 * 4 + 5 * 5, 3 * 2 + 3 * 5, 3 * 3)):
        traces = (module.project(columns, torch.full((len(columns),), label)) * columns).sum()
        assert float(traces) == pytest.approx(free)


def test_at_both_ends_of_time_predictions_are_finite_and_the_data_are_seen_at_the_last() -> None:
    module, (x, _, labels) = network(), states(9)
    x1 = module.project(x, labels)
    x1[..., DIM:] = torch.nn.functional.one_hot(x1[..., DIM:].argmax(-1), len(ELEMENTS)) * TYPE * module.present[labels]
    for number in (0.0, 1e-6, 0.5, 1 - 1e-6, 1.0):
        for dtype in (torch.float32, torch.float64):
            found = module.to(dtype)(x1.to(dtype), torch.full((9,), number, dtype=dtype), labels)
            assert found.isfinite().all()
    free = labels < 2
    torch.testing.assert_close(found[free], x1[free], rtol=0, atol=1e-6)


def test_input_and_target_of_the_network_have_size_one() -> None:
    """Of independent x_1 ~ N(0, s^2) and x_0 ~ N(0, 1): the variances of the input and of the target are 1, and what is left
    after the skip is uncorrelated with x_t."""
    scale = 1.4
    x1, x0 = scale * normal((200_000,), stream(0, "data")).double(), normal((200_000,), stream(0, "noise")).double()
    for number in (0.05, 0.5, 0.95):
        t = torch.tensor(number, dtype=torch.float64)
        skip, into, out = coefficients(t, scale)
        x = t * x1 + (1 - t) * x0
        target = (x1 - skip * x) / out
        assert abs(float((into * x).var()) - 1) < 0.02
        assert abs(float(target.var()) - 1) < 0.02
        assert abs(float((target * into * x).mean())) < 0.01


@pytest.mark.parametrize("solver", ["memoryless", "euler", "heun", "dpm-solver++", "stochastic-heun", "ddim", "ddpm"])
def test_samples_lie_in_the_space_of_centred_molecules(solver: str) -> None:
    x = model().sample(9, sampling=Sampling(solver=solver, num_inference_steps=6), seed=3)
    labels = torch.arange(9) % 3
    present = network().present[labels]
    assert (x * (1 - present)).abs().max() < 1e-12
    assert x[..., :DIM].sum(1).abs().max() < 1e-9
    given = torch.zeros(5, len(ELEMENTS), dtype=torch.float64)
    given[range(4), [1, 0, 0, 3]] = TYPE
    torch.testing.assert_close(x[labels == 2][..., DIM:], given.expand(3, -1, -1), rtol=0, atol=1e-7)


def test_the_law_of_samples_is_invariant() -> None:
    """Turned and permuted noise, at the start and in every step, gives the turned and permuted samples."""
    whole, matrix, order = model(classes=("5 atoms",)), orthogonal(1), torch.tensor([3, 0, 4, 1, 2])
    labels = torch.zeros(4, dtype=torch.long)
    flow, sampling = whole.bound(labels), Sampling(num_inference_steps=8)
    chain = sampling.build().chain(sampling.times())  # type: ignore[union-attr]
    noise = [flow.project(normal((4, 5, CHANNELS), stream(5, "noise", k), torch.float64)) for k in range(9)]

    def drawn(noise: list[Tensor]) -> Tensor:
        x = noise[0]
        for k in range(8):
            x = chain.mean(k, x, flow(x, chain.times[k])) + chain.std[k] * noise[k + 1]
        return x

    changed = drawn([turn(each, matrix)[:, order] for each in noise])
    torch.testing.assert_close(changed, turn(drawn(noise), matrix)[:, order], rtol=0, atol=1e-8)


def test_controls_adjoints_and_costs_are_those_without_padding() -> None:
    """A class beside a larger one, whose states have rows of padding, with a reward that pulls at everything: the control lies
    in the space, the adjoint in it and the cost of paths are those of the class alone."""
    pull = normal((5, CHANNELS), stream(0, "pull"), torch.float64)
    found = []
    for classes in (("3 atoms",), ("3 atoms", "5 atoms")):
        base, tuned = (model(classes=classes, seed=seed).bound(torch.zeros(6, dtype=torch.long)) for seed in (0, 1))
        for one in (base, tuned):
            one.network.load_state_dict(network(classes=("3 atoms",), seed=int(one is tuned)).state_dict())  # type: ignore[attr-defined]
        rows = model(classes=classes).event_shape[0]
        noise = [torch.zeros(6, rows, CHANNELS, dtype=torch.float64) for _ in range(7)]
        for k, each in enumerate(noise):
            each[:, :3] = normal((6, 3, CHANNELS), stream(4, "noise", k), torch.float64)
            each[:, 3:] = 5
        chain = Sampling(num_inference_steps=6).chain(0.0)
        states, costs = [base.project(noise[0])], torch.zeros(6, dtype=torch.float64)
        for k in range(6):
            x, t = states[-1], chain.times[k]
            control = tuned(x, t) - base(x, t)
            torch.testing.assert_close(control, base.project(control), rtol=0, atol=1e-9)
            costs += (chain.control_scale[k] * control).square().sum((1, 2)) / 2
            states.append(chain.mean(k, x, tuned(x, t)) + chain.std[k] * base.project(noise[k + 1]))
        reward = Objective(lambda x: (pull[: x.shape[1]] * x).sum((1, 2)).sin())
        adjoint = lean_adjoint(chain, base, states, reward, 0.5).targets[0]
        assert adjoint is not None
        found.append((torch.cat([*states]), base.project(adjoint), costs))
    for alone, beside in zip(*found, strict=True):
        if alone.ndim == 3:
            assert alone.abs().max() > 0.1
            assert beside[:, 3:].abs().max() == 0
            beside = beside[:, :3]
        torch.testing.assert_close(beside, alone, rtol=0, atol=1e-9)


def test_a_model_is_saved_and_loaded_with_its_projection(tmp_path: Path) -> None:
    whole = model()
    whole.save(tmp_path / "model")
    again = load(tmp_path / "model")
    items = [Item(text, {"label": i}) for i, text in enumerate(CLASSES)] * 2
    x = again.noise(items, stream(0, "start"), torch.tensor(0.0))
    labels = torch.arange(6) % 3
    torch.testing.assert_close(x, network().float().project(x, labels))
    assert x.abs().amax((1, 2)).min() > 0.1
    torch.testing.assert_close(again.sample(3, labels="CH2O"), whole.sample(3, labels=2).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "says"),
    [("C7H10X2", "has X"), ("atoms", "is neither"), ("0 atoms", "is neither"), ("C0H2", "is neither"), ("", "is neither")],
)
def test_what_cannot_be_asked_for_is_one_line(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        asked_of(text)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=says):
        validate(Equivariant, {"classes": [text]}, "a recipe")


def test_a_size_that_the_model_does_not_have_is_one_line() -> None:
    with pytest.raises(InputError, match="there is no class '4 atoms'; known: 5 atoms"):
        model().sample(2, labels="4 atoms")


def test_types_are_conditioned_on_an_even_number_of_odd_valences() -> None:
    """Of three atoms that are independent, by a sum over all 125 cases; a row that is no atom counts as none."""
    logits = torch.randn(2, 4, 5, generator=stream(0)).double()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])[..., None].double()
    found = (logits + log_even(logits, mask)).softmax(-1)
    odd = torch.tensor([valence % 2 for valence in VALENCES])
    for i, atoms in ((0, 3), (1, 2)):
        p = logits[i].softmax(-1)
        expected = torch.zeros(4, 5).double()
        for types in itertools.product(range(5), repeat=atoms):
            if sum(odd[each].item() for each in types) % 2 == 0:
                for row, each in enumerate(types):
                    expected[row, each] += math.prod(p[at, k].item() for at, k in enumerate(types))
        torch.testing.assert_close(found[i, :atoms], expected[:atoms] / expected[0].sum())


def test_pairs_hear_of_third_atoms_and_atoms_of_angles() -> None:
    """Against sums atom by atom; and angles are those of the ways, whichever way the molecule is turned."""
    part = Triangles(width=4, pairs=3, vectors=2, products=2).double().requires_grad_(False)
    for weights in (part.closing.weight, part.angles.weight):
        weights.copy_(torch.randn(weights.shape, generator=stream(1)))
    heard, mask = torch.randn(1, 4, 4, 3, generator=stream(0)).double(), torch.tensor([1.0, 1, 1, 0]).double()
    pairs = (mask[:, None] * mask * (1 - torch.eye(4)))[None, ..., None].double()
    found = part.of_pairs(heard, pairs)
    sides = part.sides(torch.nn.functional.silu(heard))[0]
    for i, j in itertools.product(range(4), repeat=2):
        through = [k for k in range(3) if k not in (i, j) and max(i, j) < 3]
        total = sum((sides[i, k, :2] * sides[k, j, 2:] for k in through), torch.zeros(2).double())
        torch.testing.assert_close(found[0, i, j], part.closing.weight @ total / 3)
    ways = torch.tensor([[3.0, 0, 0], [3.0, 3, 0]]).double()[None, :, None]
    seen = [
        part.angles.weight[:, 0] * 0.9 + part.angles.weight[:, 3] * 18 / 19,
        (part.angles.weight[:, 1] + part.angles.weight[:, 2]) * 9 / 190**0.5,
    ]
    torch.testing.assert_close(part.of_atoms(ways)[0, 0], seen[0] + seen[1])
    torch.testing.assert_close(part.of_atoms(ways @ orthogonal(2)), part.of_atoms(ways))


def test_triangles_and_angles_are_part_of_the_prediction() -> None:
    module, (x, t, labels) = network(), states(9)
    expected = module(x, t, labels)
    for part in ("closing", "angles"):
        without = network()
        for layer in without.layers:
            getattr(layer.third, part).weight.zero_()
        assert (without(x, t, labels) - expected).abs().max() > 1e-3, part


def test_a_model_with_even_valences_draws_them() -> None:
    """Types that an untrained network leaves to chance have an odd number of them in half of all molecules. What is asked for
    by a composition is as it was."""
    asked = {"classes": ("6 atoms", "CH3F"), "features": 8, "pair_features": 8, "layers": 1}
    plain, even = (new_network(Equivariant(**asked, even_valences=each), 0) for each in (False, True))
    shares = []
    for module in (plain, even):
        assert isinstance(module, EquivariantModule)
        drawn = Model(Flow(module, "x1", projection=module.project), (6, CHANNELS), class_names=("6 atoms", "CH3F"))
        x = drawn.sample(400, labels=0, sampling=Sampling(solver="memoryless", num_inference_steps=40))
        odd = [sum(VALENCES[NUMBERS.index(n)] for n in each.numbers.tolist()) % 2 for each in molecules_of(x)]
        shares.append(sum(odd) / len(odd))
    assert 0.4 < shares[0] < 0.6
    assert shares[1] < 0.02
    x, t = torch.randn(2, 6, CHANNELS, generator=stream(0)), torch.full((2,), 0.5)
    assert torch.equal(*(module(x, t, torch.tensor([1, 1])) for module in (plain, even)))
