"""The memory that training needs, forecast from one and two samples, against what the device has."""

# Mutation tests: none: forecasts, and words for them

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tiltflow.conditions import Item
from tiltflow.flows.linearize import linearize
from tiltflow.models.quantization import stored
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards import select
from tiltflow.rewards.functions.checked import evaluate, value_and_gradient
from tiltflow.runs.doctor.patient import Finding, Patient
from tiltflow.training.draw import Decoded
from tiltflow.training.memory import free_memory, peak_of


class Forecast(NamedTuple):
    """Bytes that training needs beside the weights: permanently, temporarily, and at the peak."""

    always: dict[str, int]
    for_a_while: dict[str, int]
    most: int


def memory(patient: Patient) -> Iterator[Finding]:
    """Compare the memory that each part of training needs with that of the device."""
    networks = (patient.tuned.network, patient.base.network)
    parameters = (p for network in networks for p in cast(nn.Module, network).parameters())
    weights = {id(p): sum(part.nbytes for part in stored(p)) for p in parameters}
    size = micro_batch(patient)
    (always, for_a_while, need), available = forecast(patient), free_memory(patient.device)
    parts = [", ".join(f"{name} {gigabytes(value)}" for name, value in part.items()) for part in (always, for_a_while)]
    text = f"beside the weights, {gigabytes(sum(weights.values()))}: {parts[0]}, and temporarily {parts[1]};"
    text += f" {gigabytes(need)} at the peak; the device has {gigabytes(available)} left with the weights in it"
    if need > available:
        fix = f"lower training.micro_batch_size (now {size}): the result is the same; gradient_checkpointing; dtype bfloat16"
        fix += "; training.decode_batch_size" if patient.model.has_decoder else ""
        yield Finding("memory", "red", text, fix)
    elif need > 0.8 * available:
        yield Finding("memory", "amber", text, f"a smaller training.micro_batch_size than {size} gives the same result in less")
    else:
        yield Finding("memory", "green", text)


def micro_batch(patient: Patient) -> int:
    """The number of samples that are evaluated at once."""
    training = patient.recipe.training
    return min(training.micro_batch_size or training.samples_per_step, len(patient.batch.x))


def forecast(patient: Patient) -> Forecast:
    """Forecast the memory of an iteration: measured on one and two samples, or computed from its shapes."""
    method, size = patient.method, micro_batch(patient)
    always = permanent(patient)
    temporary = {f"the reward of {size} samples": peak_of(partial(_score, patient), size)}
    if patient.model.has_decoder:
        several = min(patient.recipe.training.decode_batch_size or size, size)
        temporary[f"decoding {several} pictures"] = peak_of(partial(_decode, patient), several)
    of_reward = max(temporary.values())
    if method.needs.reward_gradient:  # it is taken through the last step, whose graph is kept until then
        temporary[f"adjoints of {size} samples"] = peak_of(partial(_pull_back, patient), size)
        of_reward += temporary[f"adjoints of {size} samples"]
    of_loss = temporary[f"loss and gradients of {size} samples"] = peak_of(partial(_regress, patient), size)
    return Forecast(always, temporary, sum(always.values()) + max(of_reward, of_loss))


def permanent(patient: Patient) -> dict[str, int]:
    """Bytes that are held through a whole iteration beside the weights, by what for."""
    training, method, batch = patient.recipe.training, patient.method, len(patient.batch.x)
    event, parameters = patient.batch.x[0], list(patient.tuned.parameters())
    average = sum(p.numel() * p.element_size() for p in parameters) if training.ema_decay else 0
    moments = sum(2 * p.numel() * (1 if training.use_8bit_adam else p.element_size()) for p in parameters)
    steps, copies = method.sampling.num_inference_steps, method.needs.trajectory_copies + int(patient.batch.guide is not None)
    of_number = event.element_size() if training.trajectory_dtype is None else 2
    elsewhere = training.trajectory_device is not None and patient.device.type != training.trajectory_device
    found = {
        "optimizer, average": moments + average,
        f"trajectories of {batch} samples in {steps} steps": 0
        if elsewhere
        else copies * steps * batch * event.numel() * of_number,
    }
    if patient.model.has_decoder:
        item = patient.model.example if isinstance(patient.model, TextToImage) else Item("a photograph")
        condition = patient.model.conditions([item])
        bytes_of_one = sum(part.numel() * part.element_size() for part in tree_leaves(condition) if isinstance(part, Tensor))
        found[f"conditions of {batch} samples"] = batch * bytes_of_one
    return found


def gigabytes(count: float) -> str:
    """Format a number of bytes.

    >>> gigabytes(3 << 20), gigabytes(5 << 30)
    ('3 MB', '5.0 GB')
    """
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.3g} MB"


# ---- what is measured on a few samples ----


def _regress(patient: Patient, count: int) -> None:
    """Forward and backward pass of the tuned network, for the gradient of the trained parameters."""
    flow, x = patient.batch.bind(patient.tuned).select(slice(count)), patient.batch.x[:count]
    torch.autograd.grad(flow(x, torch.tensor(0.5, device=x.device)).sum(), list(patient.tuned.parameters()), allow_unused=True)


def _pull_back(patient: Patient, count: int) -> None:
    """Forward and backward pass of the base, for the gradient with respect to the samples."""
    base, x = patient.batch.bind(patient.base).select(slice(count)), patient.batch.x[:count]
    v, pullback = linearize(base, x, torch.tensor(0.5, device=x.device))
    pullback(v)


def _decode(patient: Patient, count: int) -> None:
    """Decode latents, with their gradient if the method needs one."""
    latents = patient.batch.x[:count].clone().requires_grad_(patient.method.needs.reward_gradient)
    with torch.set_grad_enabled(latents.requires_grad):
        images = patient.model.decode(latents, batch_size=count)
        if latents.requires_grad:
            torch.autograd.grad(images.sum(), latents)


def _score(patient: Patient, count: int) -> None:
    """Evaluate the reward, on pictures if it is one of pictures, with its gradient if the method needs one."""
    x, reward = patient.batch.x[:count], select(patient.bound_reward, slice(count))
    if isinstance(reward, Decoded):
        x, reward = x.new_zeros(count, *reward.model.sample_shape), reward.reward
    if patient.method.needs.reward_gradient:
        value_and_gradient(reward, x, "drop")
    else:
        with torch.no_grad():
            evaluate(reward, x, "drop")
