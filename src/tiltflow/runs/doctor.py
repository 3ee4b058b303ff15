"""`tiltflow doctor`: what would go wrong with a recipe, found out before the money is spent.

Each check is a function of a `Patient` and gives findings: green, amber (it runs, but look at this) or red (it cannot work),
amber and red with a remedy. The last check is one real iteration.
"""

# Mutation tests: none: forecasts, and words for them

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tiltflow.conditions.prompts import Prompt
from tiltflow.errors import InputError, TiltflowError
from tiltflow.evaluation.estimates import FEW, FEW_IN_GROUP, ImportanceWeights
from tiltflow.evaluation.settings import Evaluation
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.flows.linearize import linearize
from tiltflow.formatting import duration
from tiltflow.laws.target import Target
from tiltflow.models.consistency import TIMES, WRONG_CLOCK, consistency
from tiltflow.models.model import Model
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.schedules import TOLERANCE
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards import LearnedReward, Reward, evaluate, select, value_and_gradient
from tiltflow.runs.prepare import Decoded
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import ready
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import rollout, sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.batch import Drawn
from tiltflow.training.memory import free_memory, peak_of
from tiltflow.training.method import Method
from tiltflow.training.trainer import Record
from tiltflow.user_code import tried

Level = Literal["green", "amber", "red"]
MOST = 64
"""Samples that the checks are made on, at most."""
SLOW = 20.0
"""Seconds of an iteration above which it is not run a second time to be timed warm."""


@dataclass(frozen=True)
class Finding:
    """What a check has found."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Patient:
    """A recipe with its parts in memory.

    Args:
        batch: what an iteration starts from.
        model: the base.
        loop: trains one batch after another.
    """

    recipe: Recipe
    tuned: Flow
    base: Flow | AdapterOff
    reward: Reward
    batch: Drawn
    start: Start
    device: torch.device
    model: GenerativeModel
    loop: Callable[..., Generator[Record, None, None]]

    @property
    def method(self) -> Method:
        method: Method = self.recipe.method
        return method

    @property
    def target(self) -> Target:
        """The law that the whole run aims at."""
        return self.method.target(self.recipe.training.max_train_steps, self.start)

    @property
    def size(self) -> int:
        return min(len(self.batch.x), MOST)

    @property
    def few(self) -> slice:
        return slice(self.size)

    def bound(self, flow: VelocityField) -> VelocityField:
        """A flow with the conditions of the first samples of the batch."""
        return in_chunks(self.batch.bind(flow).select(self.few), self.recipe.training.micro_batch_size)

    @property
    def told(self) -> Reward:
        """The reward of the first samples of the batch."""
        return select(self.batch.reward or self.reward, self.few)

    @torch.no_grad()
    def rewards(self, x: Tensor, which: slice | None = None) -> Tensor:
        """Of the first samples of the batch, or `which` of them: [len(x)], NaN where one is not finite and is dropped."""
        told = self.told if which is None else select(self.told, which)
        return evaluate(told, x, self.recipe.training.non_finite_rewards)

    def ends(self) -> Tensor:
        """Samples of the base, drawn as in training."""
        sampling = self.method.sampling
        generator = stream(self.recipe.seed, "doctor", device=self.device)
        with torch.no_grad():
            return sample(self.bound(self.base), self.batch.x[self.few], sampling, generator, start=self.start)


def examine(recipe: Recipe, device: str = "cpu") -> Iterator[Finding]:
    """The findings, one after another; what cannot work ends it."""
    yield geometry(recipe)
    try:
        patient = admit(recipe, device)
    except TiltflowError as error:
        yield Finding("parts", "red", str(error), "fix this first; the other checks were not run")
        return
    yield Finding("parts", "green", f"model, reward and method are there and fit each other ({patient.device.type})")
    for check in (denoising, temperature, reward_itself, reward_gradient, ratio, memoryless, parity, memory, iteration):
        try:
            yield from check(patient)
        except torch.OutOfMemoryError as error:
            smaller = "lower training.micro_batch_size: the result is the same"
            yield Finding(check.__name__, "red", str(error).splitlines()[0], smaller)
        except TiltflowError as error:
            yield Finding(check.__name__.replace("_", " "), "red", str(error), "fix this first")


def admit(recipe: Recipe, device: str) -> Patient:
    """Load what the recipe names. Raises InputError for what cannot be had or does not fit."""
    parts = ready(recipe, device).parts
    model = parts.untuned
    batch = parts.draw(stream(recipe.seed, "start", 0, device=model.device))
    return Patient(recipe, parts.flow, parts.base, parts.reward, batch, model.grid, model.device, model, parts.loop)


def examine_model(model: Model, data: Tensor | None = None) -> Finding:
    """Whether the network of a model is used as it was trained: on the right clock, in the right direction, as the right kind
    of prediction (`tiltflow.models.consistency`). green, or amber with a remedy.

    Args:
        data: 32 or more samples [n, *event] that it was trained on. Without them the model is looked at on its own samples,
            which a wrong one may fit by chance: a Gaussian around 0 that is read backwards is one.

    >>> examine_model(Model(Flow(lambda x, time: -x), (2,))).level
    'amber'

    Raises InputError if the network cannot be called, or for data of another shape.
    """
    with tried():
        found = consistency(model, data)
    errors = ", ".join(f"{error:.2g}" for error in found.errors)
    whose = "of its own samples" if data is None else "of the data"
    text = f"the error of what it denoises is {errors} of the variance {whose} at t = {', '.join(f'{t:g}' for t in TIMES)}"
    if found.wrong:
        text += f": up to {found.worst:.3g} times that of the best affine guess, so it is not the velocity of their law"
        return Finding("denoising", "amber", text, WRONG_CLOCK)
    return Finding("denoising", "green", text)


# ---- the checks ----


def denoising(patient: Patient) -> Iterator[Finding]:
    """Whether the network is the velocity field of the law that it samples."""
    if isinstance(patient.model, Model):
        yield examine_model(patient.model)


def geometry(recipe: Recipe) -> Finding:
    """How a batch is made up, in words. It was checked when the recipe was read."""
    training = recipe.training
    size, part = training.samples_per_step, training.micro_batch_size or training.samples_per_step
    made = f"{size} samples in an iteration"
    if training.prompts_per_step is not None:
        made += f" = {training.prompts_per_step} prompts x {training.num_generations} generations"
    parts = "all at once" if part >= size else f"{part} at a time, {-(-size // part)} times"
    return Finding("batch", "green", f"{made}, {parts}")


def temperature(patient: Patient) -> Iterator[Finding]:
    """Whether the target law is within reach of the base at all, and whether the evaluation has samples enough to know it."""
    target = patient.target
    if isinstance(patient.reward, LearnedReward):
        return
    found = patient.rewards(patient.ends()).cpu()
    finite = found.isfinite()
    rewards = found[finite]
    if len(rewards) < 2:
        why = f"the reward is finite for {len(rewards)} of {patient.size} base samples"
        yield Finding("temperature", "red", why, "is it the right one? training drops all others")
        return
    tilt = torch.full((len(found),), -math.inf, dtype=torch.float64)
    tilt[finite] = target.log_tilt(rewards).double()
    # each prompt, and each class, has a target law of its own
    members = [each.cpu() for each in patient.bound(patient.base).groups(len(found), patient.device)]
    weights = [torch.softmax(tilt[each], 0) for each in members if finite[each].any()]
    effective = ImportanceWeights(torch.cat(weights) / len(weights)).effective_sample_size
    share, count = effective / len(rewards), len(rewards)
    text = f"{effective:.1f} of {count} base samples carry the weight of the target law, {target.words}"
    if not float(rewards.std(correction=0)) > 0:
        same = f"the reward is {rewards[0].item():g} for all {count} samples"
        yield Finding("temperature", "red", same, "is it the right one?")
    elif share < 0.02 or effective < 1.5:
        weaker = "a weaker tilt (a larger beta; a smaller tau) is a law that the base can reach, and the report can check"
        yield Finding("temperature", "amber", f"{text}: so strong a tilt that few base samples resemble its target", weaker)
    elif share > 0.98:
        yield Finding("temperature", "amber", text + ": the target is nearly the base", "a smaller beta tilts more")
    elif (unknown := too_few_to_know(patient.recipe.evaluation, share)) is not None:
        yield Finding("temperature", "amber", f"{text}. {unknown[0]}: the report will have no verdict", unknown[1])
    else:
        yield Finding("temperature", "green", text)


def too_few_to_know(evaluation: Evaluation, share: float) -> tuple[str, str] | None:
    """Why an evaluation will not know the target law, if this share of its base samples carries its weight; and the remedy."""
    if evaluation.num_samples is not None:
        expected, needed = share * evaluation.num_samples, math.ceil(FEW / share)
        if expected >= FEW:
            return None
        remedy = f"evaluation.num_samples={needed} or more, or a weaker tilt"
        return f"Of the evaluation's {evaluation.num_samples} that would be {expected:.0f}, and {FEW} are needed", remedy
    assert evaluation.num_generations is not None
    count, needed = evaluation.num_generations, math.ceil(FEW_IN_GROUP / share)
    if share * count >= FEW_IN_GROUP:
        return None
    remedy = f"evaluation.num_generations={needed} or more, or a weaker tilt"
    said = f"Of the evaluation's {count} pictures of a prompt that would be {share * count:.1f}, and {FEW_IN_GROUP} are needed"
    return said, remedy


def reward_itself(patient: Patient) -> Iterator[Finding]:
    """Deterministic, finite, of each sample alone; its range and price."""
    x = patient.ends()
    began = time.perf_counter()
    first = patient.rewards(x)
    seconds = time.perf_counter() - began
    again = patient.rewards(x)
    alone = torch.cat([patient.rewards(x[i : i + 1], slice(i, i + 1)) for i in range(min(4, len(x)))])
    finite = first[first.isfinite()]
    if not len(finite):
        return  # said of the temperature
    spread = float(finite.std(correction=0)) or 1.0
    low, high = finite.min().item(), finite.max().item()
    unit = patient.recipe.reward.unit
    price = f"{seconds / len(x):.2g} s a sample"
    text = f"{finite.mean().item():.4g} ± {spread:.2g} {unit} at the base, {low:.4g} to {high:.4g}; {price}"
    if not torch.allclose(first, again, rtol=0, atol=0, equal_nan=True):
        change = (first - again).abs().nan_to_num(torch.inf).max().item()
        fix = "put it in evaluation mode, and give it its own seeded generator"
        yield Finding("reward", "amber", f"{text}. Two calls on the same samples differ by up to {change:.2g}", fix)
    elif not torch.allclose(first[: len(alone)], alone, rtol=0, atol=0.01 * spread, equal_nan=True):
        fix = "a reward must be of one sample alone: no batch statistics, no ranks"
        yield Finding("reward", "red", f"{text}. It gives a sample another value when it is alone", fix)
    elif len(finite) < len(first):
        left_out = f"It is finite for {len(finite)} of {len(first)} base samples"
        yield Finding("reward", "amber", f"{text}. {left_out}", "training drops the others, as non_finite_rewards says")
    else:
        yield Finding("reward", "green", f"{text}; deterministic")


def reward_gradient(patient: Patient) -> Iterator[Finding]:
    """Against a finite difference along a random direction."""
    if not patient.method.needs.reward_gradient:
        return
    ends = patient.ends()
    kept = patient.rewards(ends).isfinite().nonzero()[:4, 0]
    x, reward = ends[kept].float(), select(patient.told, kept)
    if not len(x):
        return
    _, gradient = value_and_gradient(reward, x)
    direction = torch.randn(x.shape, generator=stream(0, "direction", device=x.device), device=x.device)
    expected = (gradient * direction).flatten(1).sum(1)
    differences = []
    with torch.no_grad():
        for h in (1e-2, 3e-3, 1e-3):  # too long is not the slope, too short is rounding
            differences.append((evaluate(reward, x + h * direction) - evaluate(reward, x - h * direction)) / (2 * h))
    scale = expected.abs().max().item()
    error = min((difference - expected).abs().max().item() for difference in differences)
    if scale == 0:
        yield Finding(
            "gradient", "red", "the gradient of the reward is zero", "is it cut off, or rounded? use a method without"
        )
    elif error > 0.2 * scale:
        fix = "is something in it rounded, clipped or detached? score-as-action and orw-cfm-w2 need no gradient"
        text = f"autograd and finite differences differ by {error / scale:.0%} of the slope"
        yield Finding("gradient", "red" if error > 0.9 * scale else "amber", text, fix)
    else:
        yield Finding("gradient", "green", f"autograd matches finite differences within {error / scale:.1%}")


def ratio(patient: Patient) -> Iterator[Finding]:
    """Before the first update the tuned model is the base, and gives in training what it gives in sampling: ratio 1."""
    x = patient.batch.x[patient.few]
    t = torch.tensor(0.5, device=x.device)
    with torch.no_grad():
        sampling, base = patient.bound(patient.tuned)(x, t), patient.bound(patient.base)(x, t)
    with torch.enable_grad():
        training = patient.batch.bind(patient.tuned).select(slice(min(len(x), 4)))(x[:4], t).detach()
    scale = sampling.abs().max().item() or 1.0
    layout = (training - sampling[: len(training)]).abs().max().item() / scale
    moved = (sampling - base).abs().max().item() / scale
    if layout > 1e-2:
        fix = "switch dropout and batch statistics off: network.eval()"
        yield Finding("ratio", "red", f"in training the network gives other velocities than in sampling, by {layout:.1%}", fix)
    elif moved > 1e-2:
        fix = "begin from an adapter that is zero, or from a copy of the base"
        yield Finding("ratio", "amber", f"before training the model is {moved:.1%} from the base", fix)
    elif layout > 1e-4:
        text = f"sampling and training agree to {layout:.1e}: the precision of the network"
        yield Finding("ratio", "amber", text, "fine for most; float32 weights bring it to 1e-6")
    else:
        yield Finding("ratio", "green", f"1 before the first update (velocities agree to {max(layout, moved):.0e})")


def memoryless(patient: Patient) -> Iterator[Finding]:
    """Whether samples depend on the noise that they started from: the covariance of both, over the base's trajectories."""
    sampling, limits = patient.method.sampling, patient.target.caveats
    if not sampling.has_noise:
        if limits:
            yield Finding("target", "amber", " ".join(limits), "docs/mathematics.md says what it aims at instead")
        return
    x, chain = patient.batch.x[patient.few], sampling.chain(patient.start)
    with torch.no_grad():
        flow = patient.bound(patient.base)
        end = rollout(chain, flow, x, stream(1, "doctor", device=x.device), to_the_end=True).states[-1]
    start, end = x.flatten(1).double(), end.flatten(1).double()
    centred = end - end.mean(0)
    products = (start * centred).mean(1) / (start.square().mean().sqrt() * centred.square().mean().sqrt())
    correlation, error = products.mean().item(), (products.std() / len(products) ** 0.5).item()
    text = f"correlation of noise and sample {correlation:.3f} ± {error:.2g}"
    if abs(correlation) > max(4 * error, 0.02) or limits:
        fix = "solver memoryless forgets its start; a scheduler with timestep_spacing trailing starts from pure noise"
        yield Finding("memorylessness", "amber", f"{text}. {' '.join(limits)}".strip(), fix)
    else:
        yield Finding("memorylessness", "green", text)


def parity(patient: Patient) -> Iterator[Finding]:
    """Our sampler against the pipeline's own, from the same latents, at the model's own guidance, before the decoder."""
    model = patient.model
    if not isinstance(model, TextToImage):
        return
    prompts, (height, width) = ["a photograph"], model.size
    latents = torch.randn((1, *model.event_shape), generator=stream(0, "parity", device=model.device), device=model.device)
    ours = model.sample(prompts, latents=latents, sampling=Sampling(solver="euler", num_inference_steps=4))
    with torch.no_grad():
        drawn = model.pipeline(
            prompts[0],
            height=height,
            width=width,
            guidance_scale=model.guidance_scale,
            num_inference_steps=4,
            latents=latents.to(model.pipeline.dtype),
            output_type="latent",
            **model.encoding,
        ).images
        theirs = model.decode(cast(Tensor, drawn).to(latents)).cpu()
    error = (ours.clamp(-1, 1) - theirs.clamp(-1, 1)).abs().mean().item()
    samplings = [patient.method.sampling, *(point.sampling for point in patient.recipe.evaluation.points or ())]
    asked = {sampling.num_inference_steps for sampling in samplings if sampling.solver == "euler"}
    steps = {count: apart for count in sorted(asked) if (apart := model.schedule.own_difference(count)) > TOLERANCE}
    if steps or error > (1e-3 if model.pipeline.dtype == torch.float32 else 0.02):
        fix = "pictures are drawn on the scheduler's times by our steps; an export comes with a scheduler that takes them"
        text = f"our pictures differ from the pipeline's by {error:.2g} of the range -1 to 1 at 4 steps"
        for count, apart in steps.items():
            text += f", and its latents from the scheduler's own by {apart:.2g} of the largest at {count}"
        yield Finding("parity", "amber", text, fix)
    else:
        yield Finding("parity", "green", f"our sampler draws the pipeline's own pictures, to {error:.1e}")


class Forecast(NamedTuple):
    """Bytes that training needs beside the weights: all the time, for a while, and at the most at once."""

    always: dict[str, int]
    for_a_while: dict[str, int]
    most: int


def forecast(patient: Patient) -> Forecast:
    """What an iteration will need: counted on one and two samples, or known from its shapes."""
    training, method, event = patient.recipe.training, patient.method, patient.batch.x[0]
    parameters = list(patient.tuned.parameters())
    average = sum(p.numel() * p.element_size() for p in parameters) if training.ema_decay else 0
    moments = sum(2 * p.numel() * (1 if training.use_8bit_adam else p.element_size()) for p in parameters)
    batch = len(patient.batch.x)
    size = min(training.micro_batch_size or training.samples_per_step, batch)
    steps, copies = method.sampling.num_inference_steps, method.needs.trajectory_copies + int(patient.batch.guide is not None)
    always = {
        "optimizer, average": moments + average,
        f"trajectories of {batch} samples in {steps} steps": copies * steps * batch * event.numel() * event.element_size(),
    }
    while_ = {f"the reward of {size} samples": peak_of(partial(_score, patient), size)}
    if patient.model.has_decoder:
        several = min(training.decode_batch_size or size, size)
        while_[f"decoding {several} pictures"] = peak_of(partial(_decode, patient), several)
        condition = patient.model.conditions([Prompt("a photograph")])
        bytes_of_one = sum(part.numel() * part.element_size() for part in tree_leaves(condition) if isinstance(part, Tensor))
        always[f"conditions of {batch} samples"] = batch * bytes_of_one
    of_reward = max(while_.values())
    if method.needs.reward_gradient:  # it is taken through the last step, whose graph waits for it
        while_[f"adjoints of {size} samples"] = peak_of(partial(_pull_back, patient), size)
        of_reward += while_[f"adjoints of {size} samples"]
    of_loss = while_[f"loss and gradients of {size} samples"] = peak_of(partial(_regress, patient), size)
    return Forecast(always, while_, sum(always.values()) + max(of_reward, of_loss))


def memory(patient: Patient) -> Iterator[Finding]:
    """What each part of training needs, against what the device has."""
    training = patient.recipe.training
    networks = (patient.tuned.network, patient.base.network)
    held = {id(p): p.numel() * p.element_size() for network in networks for p in cast(nn.Module, network).parameters()}
    size = min(training.micro_batch_size or training.samples_per_step, len(patient.batch.x))
    (always, for_a_while, need), available = forecast(patient), free_memory(patient.device)
    parts = [", ".join(f"{name} {gigabytes(value)}" for name, value in part.items()) for part in (always, for_a_while)]
    text = (
        f"beside the weights, {gigabytes(sum(held.values()))}: {parts[0]}, and for a while {parts[1]}; {gigabytes(need)} at the"
    )
    text += f" most; the device has {gigabytes(available)} left with the weights in it"
    if need > available:
        fix = f"lower training.micro_batch_size (now {size}): the result is the same; gradient_checkpointing; dtype bfloat16"
        fix += "; training.decode_batch_size" if patient.model.has_decoder else ""
        yield Finding("memory", "red", text, fix)
    elif need > 0.8 * available:
        yield Finding("memory", "amber", text, f"a smaller training.micro_batch_size than {size} gives the same result in less")
    else:
        yield Finding("memory", "green", text)


def _regress(patient: Patient, count: int) -> None:
    """Forward and back through the tuned network on some samples of the batch, for the gradient of what is trained."""
    flow, x = patient.batch.bind(patient.tuned).select(slice(count)), patient.batch.x[:count]
    torch.autograd.grad(flow(x, torch.tensor(0.5, device=x.device)).sum(), list(patient.tuned.parameters()), allow_unused=True)


def _pull_back(patient: Patient, count: int) -> None:
    """Forward and back through the base on some samples of the batch, for the gradient of the samples."""
    base, x = patient.batch.bind(patient.base).select(slice(count)), patient.batch.x[:count]
    v, pullback = linearize(base, x, torch.tensor(0.5, device=x.device))
    pullback(v)


def _decode(patient: Patient, count: int) -> None:
    """Pictures of some latents, with their gradient if the method asks for it."""
    latents = patient.batch.x[:count].clone().requires_grad_(patient.method.needs.reward_gradient)
    with torch.set_grad_enabled(latents.requires_grad):
        images = patient.model.decode(latents, batch_size=count)
        if latents.requires_grad:
            torch.autograd.grad(images.sum(), latents)


def _score(patient: Patient, count: int) -> None:
    """The reward of some samples, of pictures where it is one of pictures, with its gradient if the method asks for it."""
    x, reward = patient.batch.x[:count], select(patient.told, slice(count))
    if isinstance(reward, Decoded):
        x, reward = x.new_zeros(count, *reward.model.sample_shape), reward.reward
    if patient.method.needs.reward_gradient:
        value_and_gradient(reward, x, "drop")
    else:
        with torch.no_grad():
            evaluate(reward, x, "drop")


def iteration(patient: Patient) -> Iterator[Finding]:
    """One real iteration, and what the whole run will take."""
    training, needs = patient.recipe.training, patient.method.needs
    count = min(needs.passes, training.max_train_steps)
    records, before, first = patient.loop(), 0.0, dict[str, float]()
    for attempt in range(2):  # the first one warms up
        several = [next(records) for _ in range(count)]
        seconds, before = several[-1].seconds - before, several[-1].seconds
        first = first or several[0].metrics
        if seconds > SLOW or training.max_train_steps < 2 * count or attempt:
            break
    records.close()
    total = duration(seconds / count * training.max_train_steps)
    text = f"{duration(seconds)} for {count} step{'s' if count > 1 else ''}, {total} for all {training.max_train_steps},"
    text += " evaluation not counted; " + ", ".join(
        f"{key.replace('_', ' ')} {first[key]:.4g}" for key in ("reward", "loss", "gradient_norm") if key in first
    )
    if "skipped" in first:
        yield Finding("iteration", "red", f"{text}. A number in it was not finite", "max_skipped_steps: 0 says which")
    elif first.get("path_kl", 0) > 0.1:
        fix = "mixed precision rounds the difference; mixed_precision: no is exact"
        yield Finding("iteration", "amber", f"{text}. The path KL is {first['path_kl']:.2g} before the first update", fix)
    elif first["gradient_norm"] == 0 and not needs.warmup_steps:
        yield Finding("iteration", "red", f"{text}. Nothing would be learned", "is the reward the same for all samples?")
    else:
        yield Finding("iteration", "green", text)


def verdict(findings: Sequence[Finding]) -> Level:
    """The worst of them."""
    levels = [finding.level for finding in findings]
    return "red" if "red" in levels else "amber" if "amber" in levels else "green"


def gigabytes(count: float) -> str:
    """
    >>> gigabytes(3 << 20), gigabytes(5 << 30)
    ('3 MB', '5.0 GB')
    """
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.3g} MB"


def refuse(error: InputError) -> Finding:
    """A recipe that cannot be read."""
    return Finding("recipe", "red", str(error), "fix this first; the other checks were not run")
