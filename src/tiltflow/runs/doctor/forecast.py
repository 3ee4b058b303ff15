"""The memory that a training needs on its device, in each of its phases, forecast without weights.

A term of it stands where it belongs: weights in `resident`, what the loop keeps and what calls need in `dry_run`.
"""

# Mutation tests: none: forecasts

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.flow import Flow
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.prompted import told
from tiltflow.runs.doctor.architecture import model_from_configs
from tiltflow.runs.doctor.dry_run import Subject, peaks
from tiltflow.runs.doctor.patient import Patient
from tiltflow.runs.doctor.reward_shapes import reward_of_shapes
from tiltflow.runs.doctor.shapes import Cost, Peak, alone, bytes_of, copy_of_shapes
from tiltflow.runs.recipe import Recipe
from tiltflow.settings import Settings
from tiltflow.training.memory import peak_of

PHASES = {
    "encoding": "encoding the prompts",
    "rollout": "drawing samples",
    "adjoint": "the adjoint of the base",
    "reward": "decoding and scoring",
    "update": "learning",
}
"""The phases of a training, in words: those of `tiltflow.timing`, and what comes before."""
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
    scorers = {id(part): ("reward", part) for part in modules_of(patient.reward)}
    others = {id(part): ("of the evaluation", part) for part in modules_of(patient.instruments)}
    for i, (what, part) in enumerate({**others, **scorers}.values()):
        networks[f"{what} {i + 1}"] = part
    scored = partial(_scored, patient.reward, patient.items)
    subject = Subject(
        tuned,
        AdapterOff(tuned) if isinstance(base, AdapterOff) else without_weights(base),
        model,
        scored,
        patient.items,
        patient.method,
        patient.recipe.training,
        measured_reward=partial(_measured_reward, scored, patient.device),
    )
    weights = {name: _weights(part) for name, part in networks.items()}
    counts = {name: _parameters(part) for name, part in networks.items()}
    return _forecast(subject, {}, weights, counts)


Known = dict[str, dict[Any, Cost]]
"""What calls need, by the settings that it depends on."""


def of_recipe(recipe: Recipe, *, known: Known | None = None) -> Forecast:
    """Forecast the memory of a recipe for a pipeline from the configs of its components: no weights are read.

    Args:
        known: what calls were found to need; recipes with the same model share it.

    Raises InputError if its configs are not known, or its model is no pipeline.
    """
    source = recipe.source
    if not isinstance(source, Diffusers):
        raise InputError("--config-only is for pipelines of diffusers; of this model leave it out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of the schedule is said when the weights are there
        model = model_from_configs(source)
        base, tuned = trainable_shapes(model, recipe)
    dtype = None if recipe.training.mixed_precision == "no" else torch.bfloat16
    flow = replace(tuned, autocast=dtype)
    of_base: Flow | AdapterOff = AdapterOff(flow) if isinstance(base, AdapterOff) else replace(base, autocast=dtype)
    reward, scorers = reward_of_shapes(recipe.reward)
    for settings in recipe.evaluation.rewards:
        for name, part in reward_of_shapes(settings)[1].items():
            scorers[f"{name} of the evaluation"] = part
    count = None
    items: Sequence[Item] = [Item("a photograph")]
    with suppress(InputError):  # the file of prompts may be elsewhere
        items = recipe.asked_for.items((), recipe.seed)[0]
        count = len(items)
    same = "".join(part.model_dump_json() for part in (cast(Settings, source), cast(Settings, recipe.reward)))
    calls = ({} if known is None else known).setdefault(f"{same} {dtype} {recipe.training.trainable.pattern}", {})
    subject = Subject(flow, of_base, model, reward, items[:1], recipe.method, recipe.training, known=calls)
    family = model.family
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    networks: dict[str, nn.Module] = {name: part for name, part in parts.items() if name not in encoders}
    if isinstance(base, AdapterOff):
        networks[family.denoiser] = cast(nn.Module, flow.network)
    else:
        networks[f"trained {family.denoiser}"] = cast(nn.Module, flow.network)
    networks |= scorers
    weights = {name: _weights(part) for name, part in networks.items()}
    texts = {name: _weights(part) for name, part in encoders.items()}
    before: dict[str, Peak] = {}
    with alone() as memory:
        condition = model.conditions(items[:1])[0]
    if source.text_encoders != "cpu":
        kept = texts if source.text_encoders == "keep" else {}
        before["encoding"] = Peak({"weights": sum(weights.values()) + sum(texts.values()), "text encoders": memory.peak})
        weights |= kept
    counts = {name: _parameters(part) for name, part in {**networks, **encoders}.items()}
    one = sum(part.numel() for part in tree_leaves(condition) if isinstance(part, Tensor))
    one *= next(p.element_size() for p in parts[family.denoiser].parameters())
    cache = None if count is None else int(min(count * one, source.prompt_cache_gb * 2**30))
    found = _forecast(subject, before, weights, counts)
    return replace(found, prompt_cache=cache, resident={**found.resident, **({"encoding": weights | texts} if before else {})})


def _forecast(subject: Subject, before: Mapping[str, Peak], weights: Mapping[str, int], counts: Mapping[str, int]) -> Forecast:
    """The forecast of a training: `before` it begins, and each phase beside its weights."""
    found = peaks(subject)
    between = found.pop("", None)  # such as the drawing of a batch
    if between is not None and ("update" not in found or between.total > found["update"].total):
        found["update"] = between
    ordered = [name for name in PHASES if name in found]
    training = {name: Peak({"weights": sum(weights.values()), **found[name].parts}) for name in ordered}
    return Forecast({**before, **training}, dict.fromkeys(ordered, weights), counts)


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


def _weights(network: Any) -> int:
    """Bytes of the weights of a network."""
    return bytes_of([*network.parameters(), *network.buffers()]) if isinstance(network, nn.Module) else 0


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


def modules_of(thing: Any, depth: int = 6) -> list[nn.Module]:
    """The networks that a function or an object holds."""
    if isinstance(thing, nn.Module):
        return [thing]
    if depth == 0 or isinstance(thing, (str, bytes, Tensor, type)):
        return []
    held: list[Any] = []
    if isinstance(thing, Mapping):
        held = list(thing.values())
    elif isinstance(thing, (list, tuple)):
        held = list(thing)
    held += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or () if _is_filled(cell)]
    held += [getattr(thing, "__self__", None), *getattr(thing, "args", ())] if callable(thing) else []
    held += list(vars(thing).values()) if hasattr(thing, "__dict__") and type(thing).__module__.startswith("tiltflow") else []
    return list({id(part): part for inner in held if inner is not None for part in modules_of(inner, depth - 1)}.values())


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
