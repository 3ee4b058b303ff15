"""The memory that a training needs on its device, in each of its phases, forecast without weights.

A term of it stands where it belongs: weights in `resident`, what the loop keeps and what calls need in `dry_run`.
"""

# Mutation tests: none: forecasts

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.evaluation.samples import Instruments
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.flow import Flow
from tiltflow.models.quantization import stored
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.models.text_to_image import TextToImage
from tiltflow.offload import networks_in
from tiltflow.rewards import LearnedReward, Reward
from tiltflow.rewards.functions.prompted import told
from tiltflow.runs.doctor.architecture import model_from_configs
from tiltflow.runs.doctor.dry_evaluation import Measured, peak_of_evaluation
from tiltflow.runs.doctor.dry_run import BETWEEN, Subject, peaks
from tiltflow.runs.doctor.patient import Patient
from tiltflow.runs.doctor.reward_shapes import reward_of_shapes
from tiltflow.runs.doctor.shapes import Cost, Peak, alone, copy_of_shapes, deep_copy_of_shapes
from tiltflow.runs.prepare import asked_of, can_make_room
from tiltflow.runs.recipe import Recipe
from tiltflow.settings import Settings
from tiltflow.training.memory import peak_of

PHASES = {
    "encoding": "encoding the prompts",
    "rollout": "drawing samples",
    "adjoint": "computing the adjoint",
    "reward": "decoding and scoring",
    "update": "learning",
    "evaluation": "evaluating",
}
"""The phases of a run, in words: those of `tiltflow.timing`, and what comes before and after."""
CONTEXT, FRAGMENTED = 0.75 * 2**30, 0.05
"""Bytes that CUDA and its libraries take for themselves, and the share of memory that is lost between tensors: assumptions."""


@dataclass(frozen=True)
class Forecast:
    """What a training needs on its device.

    Args:
        phases: the largest memory of each phase, by what it is for, with the weights.
        resident: weights by component, in each phase.
        parameters: numbers of parameters by component.
        prompt_cache: bytes of encoded prompts in the memory of the CPU; None if the number of prompts is not known.
    """

    phases: Mapping[str, Peak]
    resident: Mapping[str, Mapping[str, int]]
    parameters: Mapping[str, int]
    prompt_cache: int | None = None

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def most(self) -> float:
        """Bytes at the peak of all phases."""
        return self.phases[self.worst].total

    @property
    def on_a_gpu(self) -> float:
        """Bytes at the peak, with what a GPU needs beside tensors."""
        return self.most * (1 + FRAGMENTED) + CONTEXT


def of_patient(patient: Patient) -> Forecast:
    """Forecast the memory of a recipe whose parts are there; prompts are encoded by then."""
    tuned, base = without_weights(patient.tuned), patient.base
    networks: dict[str, Any] = {"the network": patient.tuned.network}
    if not isinstance(base, AdapterOff):
        networks["its frozen copy"] = base.network
    model: Any = patient.model
    if isinstance(model, TextToImage):
        view = copy.copy(model.pipeline)
        view.vae = copy_of_shapes(model.pipeline.vae)
        networks["vae"] = model.pipeline.vae
        networks |= model.encoder.encoders.parts if model.encoder.encoders.use == "keep" else {}
        model = replace(model, pipeline=view)
    scorers = {id(part): ("reward", part) for part in networks_in(patient.reward)}
    others = {id(part): ("of the evaluation", part) for part in networks_in(patient.instruments)}
    for i, (what, part) in enumerate({**others, **scorers}.values()):
        networks[f"{what} {i + 1}"] = part
    learned = patient.reward if isinstance(patient.reward, LearnedReward) else None
    adapted = isinstance(base, AdapterOff) and can_make_room(cast(nn.Module, patient.tuned.network), patient.recipe.training)
    scored = partial(_scored, patient.reward, patient.items)
    of_evaluation: dict[str, Reward] = {
        name: partial(_scored, each, patient.items) for name, each in patient.instruments.rewards.items()
    }
    subject = Subject(
        tuned,
        AdapterOff(tuned) if isinstance(base, AdapterOff) else without_weights(base),
        model,
        scored,
        patient.items,
        patient.method,
        patient.recipe.training,
        makes_room=adapted,
        learner=(lambda: deep_copy_of_shapes(learned)[0]) if learned else None,
        measured_reward=partial(_measured_reward, scored, patient.device),
    )
    instruments = replace(patient.instruments, rewards=of_evaluation)
    measured = Measured(patient.recipe, patient.asked, instruments, patient.device.type != "cpu")
    weights = {name: _weights(part) for name, part in networks.items()}
    counts = {name: _parameters(part) for name, part in networks.items()}
    if learned is not None:
        weights["data of the reward"] = deep_copy_of_shapes(learned)[1] - _weights(learned.network)
    away = {name for name, part in networks.items() if name == "vae" or (name.startswith("reward") and learned is None)}
    copied = {"its frozen copy"} & set(networks)
    frozen = {"the network": _frozen(cast(nn.Module, patient.tuned.network))} if adapted else {}
    iteration = peaks(subject) | {"evaluation": peak_of_evaluation(subject, measured)}
    by_phase = resident(weights, away, copied, frozen, offload=patient.recipe.training.offload)
    return _forecast(iteration, {}, by_phase, counts, looks=patient.recipe.training.monitor is not None)


Known = dict[str, dict[Any, Any]]
"""What calls, iterations and evaluations need, and the parts of models, by the settings that it depends on."""


def of_recipe(recipe: Recipe, *, known: Known | None = None, apart: bool = True) -> Forecast:
    """Forecast the memory of a recipe for a pipeline from the configs of its components: no weights are read.

    Args:
        apart: whether the device has a memory of its own, apart from the CPU's.
        known: what calls were found to need; recipes with the same model share it.

    Raises InputError if its configs are not known, or its model is no pipeline.
    """
    source = recipe.source
    if not isinstance(source, Diffusers):
        raise InputError("--config-only is for pipelines of diffusers; of this model leave it out")
    known = {} if known is None else known
    settings = _settings_of_calls(recipe)
    items: Sequence[Item] = [Item("a photograph")]
    held_out: Sequence[Item] = [*items] * (recipe.evaluation.num_prompts or 1)
    count = None
    with suppress(InputError):  # the file of prompts may be elsewhere
        items, held_out = recipe.asked_for.items((), recipe.seed)
        count = len(items)
    made = known.setdefault(f"model {settings['network']} {settings['decoder']} {items[0]}", {})
    if not made:
        made |= {"parts": _parts(recipe, source, items[:1])}
    model, base, tuned, condition, to_encode = made["parts"]
    dtype = None if recipe.training.mixed_precision == "no" else torch.bfloat16
    flow = replace(tuned, autocast=dtype)
    of_base: Flow | AdapterOff = AdapterOff(flow) if isinstance(base, AdapterOff) else replace(base, autocast=dtype)
    reward, scorers = reward_of_shapes(recipe.reward)
    rewards = {recipe.reward_name: reward}
    for i, another in enumerate(recipe.evaluation.rewards):
        rewards[f"{another.name} {i + 2}"], networks = reward_of_shapes(another)
        scorers |= {f"{name} of the evaluation": part for name, part in networks.items()}
    calls = {name: known.setdefault(f"{name} {of_calls}", {}) for name, of_calls in settings.items()}
    denoiser, frozen = model.family.denoiser, cast(nn.Module, base.network)
    asked = recipe.training.offload and recipe.training.compile is None
    room = asked and isinstance(base, AdapterOff) and denoiser not in source.quantization
    subject = Subject(flow, of_base, model, reward, items[:1], recipe.method, recipe.training, calls, room)
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    networks = {name: part for name, part in {**parts, **scorers}.items() if name not in (denoiser, *encoders)}
    trained = {} if isinstance(base, AdapterOff) else {f"trained {denoiser}": cast(nn.Module, flow.network)}
    everything = {denoiser: frozen, **trained, **networks, **encoders}
    weights = {name: _weights(part, source.quantization.get(name)) for name, part in everything.items()}
    texts = {name: weights[name] for name in encoders}
    training = {name: size for name, size in weights.items() if name not in texts or source.text_encoders == "keep"}
    before: dict[str, tuple[Peak, dict[str, int]]] = {}
    if source.text_encoders != "cpu":
        there = {name: weights[name] for name in (*networks, *texts)}
        there |= {denoiser: weights[denoiser]} if source.text_encoders == "keep" else {}
        before["encoding"] = Peak({"weights": sum(there.values()), "text encoders": to_encode}), there
    away = {name for name in networks if not name.endswith("of the evaluation")}
    counts = {name: _parameters(part) for name, part in everything.items()}
    moved = {denoiser: _frozen(frozen)} if room else {}
    by_phase = resident(training, away, {denoiser} if trained else set(), moved, offload=recipe.training.offload)
    of_training = recipe.training.model_copy(update={"offload": False}).model_dump_json()  # which is of weights, but for room
    of_method = cast(Settings, recipe.method).model_dump_json()
    iteration = known.setdefault(f"iteration {settings} {of_method} {of_training} {room}", {})
    if not iteration:
        iteration |= peaks(subject)
    of_evaluation = f"{recipe.evaluation.model_dump_json()} {apart}"
    evaluation = known.setdefault(f"evaluation {settings} {of_method} {of_training} {of_evaluation}", {})
    if not evaluation:
        instruments = Instruments(rewards, None, None, recipe.evaluation.at_once, "cpu")
        measured = Measured(recipe, asked_of(items, held_out, recipe.evaluation), instruments, apart)
        evaluation |= {"evaluation": peak_of_evaluation(subject, measured)}
    layer = _largest_layer(frozen) if denoiser in source.quantization else 0
    found = _forecast(iteration | evaluation, before, by_phase, counts, layer, looks=recipe.training.monitor is not None)
    one = sum(part.numel() for part in tree_leaves(condition) if isinstance(part, Tensor))
    one *= next(p.element_size() for p in parts[denoiser].parameters())
    return replace(found, prompt_cache=None if count is None else int(min(count * one, source.prompt_cache_gb * 2**30)))


def _parts(recipe: Recipe, source: Diffusers, items: Sequence[Item]) -> tuple[TextToImage, Flow | AdapterOff, Flow, Any, int]:
    """The model of a recipe from its configs, its base and what is trained, an encoded prompt, and the bytes that encoding one
    needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of the schedule is said when the weights are there
        model = model_from_configs(source)
        base, tuned = trainable_shapes(model, recipe)
    with alone() as memory:
        condition = model.conditions(items)[0]
    return model, base, tuned, condition, memory.peak


def _settings_of_calls(recipe: Recipe) -> dict[str, str]:
    """The settings that the memory of calls depends on, for each of `dry_run.FUNCTIONS`. That of quantized weights and of text
    encoders is known without calls."""
    source, training = cast(Diffusers, recipe.source), recipe.training
    others = {name: part for name, part in source.replaced.items() if name != "vae"}
    dtypes = {name: dtype for name, dtype in source.dtypes.items() if name != "vae"}
    without: dict[str, Any] = {
        "quantization": {},
        "text_encoders": "keep",
        "components": others,
        "without": (),
        "dtype": dtypes,
    }
    without |= {"vae_tiling": False, "vae_slicing": False}
    network = source.model_copy(update=without).model_dump_json()
    vae = source.replaced.get("vae"), source.dtypes.get("vae"), source.vae_tiling, source.vae_slicing
    return {
        "network": f"{network} {training.mixed_precision} {training.trainable.pattern}",
        "decoder": str((source.diffusers, source.height, source.width, *vae)),
        "reward": cast(Settings, recipe.reward).model_dump_json(),
    }


def resident(
    weights: Mapping[str, int], scorers: AbstractSet[str], copied: AbstractSet[str], frozen: Mapping[str, int], *, offload: bool
) -> dict[str, dict[str, int]]:
    """The weights that are on the device in each phase of a training.

    Args:
        scorers: names of the decoder and of the networks of the reward.
        copied: name of the frozen copy of a network that is tuned as a whole.
        frozen: bytes of a network with an adapter that make room for the scorers.
        offload: whether they are on the CPU while nothing needs them.
    """
    absent = {"update": {*scorers, *copied}, "rollout": scorers, "adjoint": scorers} if offload else {}
    found = {
        phase: {name: size for name, size in weights.items() if name not in absent.get(phase, ())}
        for phase in PHASES
        if phase != "encoding"
    }
    for name, size in frozen.items():
        found["reward"][name] -= size
    return found


def _forecast(
    iteration: Mapping[str, Peak],
    before: Mapping[str, tuple[Peak, dict[str, int]]],
    weights: Mapping[str, Mapping[str, int]],
    counts: Mapping[str, int],
    layer: int = 0,
    *,
    looks: bool,
) -> Forecast:
    """The forecast of a run: `before` the training, each phase of an iteration, and the evaluation, beside the weights.

    Args:
        layer: bytes of the largest layer of quantized weights, in the dtype in which it computes.
        looks: whether samples are evaluated while it trains, beside what an iteration leaves to the next.
    """
    found = dict(iteration)
    left = found.pop(BETWEEN)
    if looks:
        evaluation = found["evaluation"].parts
        found["evaluation"] = Peak(
            {part: evaluation.get(part, 0) + left.parts.get(part, 0) for part in {*evaluation, *left.parts}}
        )
    between = found.pop("", None)  # such as the drawing of a batch
    if between is not None and ("update" not in found or between.total > found["update"].total):
        found["update"] = between
    phases = {name: peak for name, (peak, _) in before.items()}
    for name in [name for name in PHASES if name in found]:
        parts = {"weights": sum(weights[name].values()), **found[name].parts}
        phases[name] = Peak({**parts, "a layer as it computes": layer} if layer else parts)
    there = {name: weights for name, (_, weights) in before.items()}
    return Forecast(phases, {name: there.get(name) or weights[name] for name in phases}, counts)


def trainable_shapes(model: TextToImage, recipe: Recipe) -> tuple[Flow | AdapterOff, Flow]:
    """(base, what is trained) of a pipeline without weights: what `trainable` of one with weights gives."""
    adapter = recipe.source.adapter
    if adapter is not None:
        tuned = without_weights(cast(Flow, model.trainable(adapter, seed=recipe.seed)[1].flow))
        return AdapterOff(tuned), tuned
    base = cast(Flow, model.flow)
    network = copy_of_shapes(cast(nn.Module, base.network), torch.float32)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(re.search(recipe.training.trainable, name) is not None)
    return base, replace(base, network=network)


def without_weights(flow: Flow) -> Flow:
    """The same field, its network without memory."""
    return replace(flow, network=copy_of_shapes(cast(nn.Module, flow.network)))


BITS = {"nf4": 4 + 32 / 64, "int8": 8, "float8": 8}
"""Of a weight of a layer: for nf4 with a scale of 32 bits for 64 of them; those of int8 and float8 are one for each row."""


def _weights(network: Any, kind: str | None = None) -> int:
    """Bytes of the weights of a network, the layers of which may be quantized; adapters never are."""
    if not isinstance(network, nn.Module):
        return 0
    size = sum(part.nbytes for p in (*network.parameters(), *network.buffers()) for part in stored(p))
    if kind is None:
        return size
    layers = _layers(network)
    rows = 0 if kind == "nf4" else sum(4 * len(p) for p in layers)
    return size + rows - sum(p.numel() * p.element_size() - int(p.numel() * BITS[kind] / 8) for p in layers)


def _frozen(network: nn.Module) -> int:
    """Bytes of the weights of a network that are not trained."""
    return sum(parameter.nbytes for parameter in network.parameters() if not parameter.requires_grad)


def _layers(network: nn.Module) -> list[Tensor]:
    """The weights of linear layers, which are quantized: those of adapters are not."""
    named = network.named_modules()
    return [part.weight for name, part in named if isinstance(part, nn.Linear) and "lora_" not in name]


def _largest_layer(network: nn.Module) -> int:
    """Bytes of the largest of them."""
    return max(p.numel() * p.element_size() for p in _layers(network))


def _parameters(network: Any) -> int:
    """The number of parameters of a network."""
    return sum(p.numel() for p in network.parameters()) if isinstance(network, nn.Module) else 0


def _scored(reward: Reward, items: Sequence[Item], x: Tensor) -> Tensor:
    """The reward of samples of one item, if it asks what they are of."""
    return told(reward, [items[0] if items else Item("")] * len(x))(x)


def _measured_reward(reward: Reward, device: torch.device, x: Tensor, gradient: bool) -> Cost:
    """What a reward needs that cannot be called without numbers, by calls of it on one and two samples."""

    def run(count: int) -> None:
        samples = torch.zeros((count, *x.shape[1:]), device=device, requires_grad=gradient)
        with torch.set_grad_enabled(gradient):
            value = reward(samples)
            if gradient:
                torch.autograd.grad(value.sum(), samples)

    size = peak_of(run, len(x))
    return Cost((x.shape[:1], torch.float32), gradient, 0, size, size)
