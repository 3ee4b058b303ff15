"""The memory that training needs, phase by phase, against what the device has, and which setting needs how much less."""

# Mutation tests: none: forecasts, and words for them

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tiltflow.errors import TiltflowError
from tiltflow.models.pipelines import families, family_named
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.doctor.architecture import architecture
from tiltflow.runs.doctor.forecast import PHASES, Forecast, Known, of_patient, of_recipe
from tiltflow.runs.doctor.patient import Finding, Level, Patient
from tiltflow.runs.recipe import Recipe
from tiltflow.training.memory import free_memory

WORDS = {
    "weights": "weights",
    "optimizer": "moments of AdamW",
    "gradients": "gradients",
    "text encoders": "the text encoders at work",
    "network": "the network at work",
    "decoder": "the decoder at work",
    "reward": "the reward at work",
    "features": "the features at work",
    "rest": "trajectories and the like",
}
"""Parts of a peak in words, as they are listed."""
COMPILED = "training.compile: networks are counted as they are without it, which need no less"
KEPT = (
    "torch can keep more than its tensors have at the peak, for those of other sizes: 2 to 7 % was measured of Adjoint"
    " Matching, 67 % of Score as Action, on one GPU; PyTorch's remedy is PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)
LEAST = 0.005
"""Share of a peak from which on a part of it is named."""
ROOM = 0.8
"""Share of the device's memory above which a peak is tight."""


def memory(patient: Patient) -> Iterator[Finding]:
    """Compare the memory that each phase of training needs with that of the device."""
    recipe, source = patient.recipe, patient.recipe.source
    try:
        packed = isinstance(source, Diffusers) and source.quantization  # such weights cannot be copied without their numbers
        apart = patient.device.type != "cpu"
        found = of_recipe(recipe, apart=apart) if packed and isinstance(recipe, Recipe) else of_patient(patient)
    except Exception as error:  # whatever a network raises that cannot be called without numbers
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        text = f"not forecast: the network, or the decoder, cannot be called on tensors without numbers ({reason})"
        yield Finding("memory", "amber", text, "peak_memory_bytes of a short run says what it needs")
        return
    there = sum(found.resident[found.worst].values()) if patient.device.type == "cuda" else 0
    yield finding(recipe, found, free_memory(patient.device) + there, on_gpu=patient.device.type == "cuda")


def finding(recipe: CommonRecipe, found: Forecast, available: float, *, on_gpu: bool, known: Known | None = None) -> Finding:
    """The finding for a forecast.

    Args:
        available: bytes for weights and all else.
        on_gpu: whether CUDA needs some of it for itself.
        known: of the forecast, for those of other settings.
    """
    need = _peak(found, on_gpu)
    fits = "does not fit" if need > available else "fits" if need <= ROOM * available else "fits, with little room"
    text = f"{fits}: {gigabytes(need)} at the peak, while {PHASES[found.worst]}; the device has {gigabytes(available)}"
    if on_gpu:
        text += f". {gigabytes(need - found.most)} of it are assumed, for CUDA itself and lost between tensors; of tensors:"
    lines = [f"{PHASES[name]:>26}  {gigabytes(peak.total):>8} = {summed(peak.parts)}" for name, peak in found.phases.items()]
    numbers = as_json(found, need, available)
    if recipe.training.compile is not None:
        lines.append(COMPILED)
    if on_gpu and not recipe.method.needs.reward_gradient:
        lines.append(KEPT)
    text = "\n".join([text, *lines])
    if need <= ROOM * available:
        return Finding("memory", "green", text, numbers=numbers)
    level: Level = "red" if need > available else "amber"
    return Finding("memory", level, text, "\n".join(remedies(recipe, found, known, apart=on_gpu)), numbers=numbers)


def summed(parts: Mapping[str, float]) -> str:
    """Parts of a peak, with what they are for."""
    total = sum(parts.values())
    named = [(WORDS.get(name, name), parts[name]) for name in [*WORDS, *(set(parts) - set(WORDS))] if name in parts]
    return " + ".join(f"{what} {gigabytes(size)}" for what, size in named if size > LEAST * total) or "nothing"


def as_json(found: Forecast, need: float, available: float) -> dict[str, Any]:
    """The numbers of a forecast, in bytes."""
    return {
        "peak_bytes": round(need),
        "available_bytes": round(available),
        "worst_phase": found.worst,
        "phases": {name: {part: round(size) for part, size in peak.parts.items()} for name, peak in found.phases.items()},
        "weights": {name: dict(parts) for name, parts in found.resident.items()},
        "parameters": dict(found.parameters),
        "prompt_cache_bytes": found.prompt_cache,
    }


def gigabytes(count: float) -> str:
    """Format a number of bytes.

    >>> gigabytes(3 << 20), gigabytes(5 << 30)
    ('3 MB', '5.0 GB')
    """
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.3g} MB"


# ---- remedies ----


def remedies(recipe: CommonRecipe, found: Forecast, known: Known | None = None, *, apart: bool = True) -> list[str]:
    """Settings that lower the peak, each with the peak that it leads to, the lowest first; `apart` as of `of_recipe`."""
    if isinstance(recipe, Recipe) and isinstance(recipe.source, Diffusers) and _has_configs(recipe.source):
        changes = _changes(recipe)
        known = {} if known is None else known
        tried = [(words, less) for words, changed in changes.items() if (less := _tried(changed, known, apart)) is not None]
        helpful = sorted((_peak(less, apart), words) for words, less in tried if less.most < 0.98 * found.most)
        now = gigabytes(_peak(found, apart))
        if helpful:
            return ["these need less:", *(f"{words}: {gigabytes(most)} in place of {now}" for most, words in helpful)]
    size = recipe.training.micro_batch_size or recipe.training.samples_per_step
    return [f"lower training.micro_batch_size (now {size}): the result is the same"]


def _has_configs(source: Diffusers) -> bool:
    try:
        architecture(source.diffusers)
    except TiltflowError:
        return False
    return True


def _tried(recipe: Recipe, known: Known, apart: bool) -> Forecast | None:
    """The forecast of a recipe; None if there is none."""
    try:
        return of_recipe(recipe, known=known, apart=apart)
    except TiltflowError:
        return None


def _peak(found: Forecast, apart: bool) -> float:
    """Bytes at the peak, with what a GPU needs beside tensors."""
    return found.on_a_gpu if apart else found.most


def _changes(recipe: Recipe) -> dict[str, Recipe]:
    """Recipes with a setting changed that lowers the memory, by that setting. The first ones change no result."""
    training, source = recipe.training, recipe.source
    assert isinstance(source, Diffusers)
    size = training.micro_batch_size or training.samples_per_step
    found: dict[str, Recipe] = {}

    def add(words: str, **of_training: Any) -> None:
        found[words] = recipe.model_copy(update={"training": training.model_copy(update=of_training)})

    def add_to_model(words: str, **of_model: Any) -> None:
        found[words] = recipe.model_copy(update={"model": source.model_copy(update=of_model)})

    if size > 1:
        smaller = next(part for part in range(size // 2, 0, -1) if training.samples_per_step % part == 0)
        add(f"training.micro_batch_size={smaller}", micro_batch_size=smaller)
    if (training.decode_batch_size or size) > 1:
        add("training.decode_batch_size=1", decode_batch_size=1)
    if recipe.evaluation.at_once > 1:
        fewer = recipe.evaluation.model_copy(update={"batch_size": 1})
        found["evaluation.batch_size=1"] = recipe.model_copy(update={"evaluation": fewer})
    if not source.gradient_checkpointing:
        add_to_model("model.gradient_checkpointing=true", gradient_checkpointing=True)
    if source.text_encoders != "cpu":
        add_to_model("model.text_encoders=cpu", text_encoders="cpu")
    if source.dtypes["default"] == "float32":
        add_to_model("model.dtype=bfloat16", dtype={**source.dtypes, "default": "bfloat16"})
    if source.dtypes.get("vae", "float32") == "float32":
        add_to_model("model.dtype={vae: bfloat16, ..}", dtype={**source.dtypes, "vae": "bfloat16"})
    if not source.vae_tiling:
        add_to_model("model.vae_tiling=true", vae_tiling=True)
    if source.adapter is not None and not source.quantization:
        name = family_named(str(architecture(source.diffusers).pipeline["_class_name"]), families()).denoiser
        add_to_model(f"model.quantization={{{name}: nf4}}", quantization={name: "nf4"})
    if not training.offload:
        add("training.offload=true", offload=True)
    if training.trajectory_device is None:
        add("training.trajectory_device=cpu", trajectory_device="cpu")
    return found


def of_configs(recipe: Recipe, available: float, *, on_gpu: bool) -> Finding:
    """The finding for the memory of a recipe, from the configs of its pipeline alone."""
    known: Known = {}
    return finding(recipe, of_recipe(recipe, known=known, apart=on_gpu), available, on_gpu=on_gpu, known=known)


def whole_memory(device: torch.device) -> int:
    """Bytes of a GPU, or those that are free on the CPU."""
    if device.type == "cuda":
        whole: int = torch.cuda.get_device_properties(device).total_memory
        return whole
    return free_memory(device)
