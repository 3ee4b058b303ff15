"""From a model, a reward, a method and settings to a loop that can begin: the same for every kind of model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn

from tiltflow import processes
from tiltflow.conditions import Item
from tiltflow.conditions.prompts import Prompts
from tiltflow.control.objective import RunningReward
from tiltflow.errors import InputError, Note, not_installed
from tiltflow.evaluation.samples import Asked
from tiltflow.evaluation.settings import Evaluation
from tiltflow.flows.adapter import AdapterOff, base_of, has_adapter
from tiltflow.flows.counting import CountEvaluations
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.flow import Flow
from tiltflow.flows.precision import autocast_dtype, tf32, without_cudnn_attention
from tiltflow.models.compiled import compiled, try_compiled
from tiltflow.models.model import Model
from tiltflow.models.policy import Policy
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.models.trainable import Adapter
from tiltflow.offload import Offload, networks_in, offloaded
from tiltflow.optimization import adamw
from tiltflow.rewards import LearnedReward, Reward, RewardSettings
from tiltflow.runs.caveats import few_steps_limits
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.streams import stream
from tiltflow.tensor_file import Tree
from tiltflow.training.batch import Drawn
from tiltflow.training.calibration import Calibration, target_reward
from tiltflow.training.draw import batches
from tiltflow.training.kl_budget import KlBudget
from tiltflow.training.method import Method, fewest_samples
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.settings import Training
from tiltflow.training.temperature import Temperature
from tiltflow.training.trainer import Record, temperature_state, train
from tiltflow.user_code import tried

M = TypeVar("M", bound=GenerativeModel)


@dataclass(frozen=True)
class Prepared(Generic[M]):
    """A training that can begin.

    Args:
        untuned: the model without what is trained, whatever that has become.
        tuned: what is going to be trained.
        flow, base: the velocity fields of the tuned and the untuned model, in the precision of the training.
        reward: of samples, as training sees it.
        draw: the start of an iteration.
        loop: takes the arguments of `train` about where to resume from and when to stop.
    """

    untuned: M
    tuned: M
    flow: Flow
    base: Flow | AdapterOff
    reward: Reward
    draw: Callable[[torch.Generator], Drawn]
    loop: Callable[..., Generator[Record, None, None]]


# ---- the loop ----


def prepare(
    model: M,
    tuned: M,
    items: Sequence[Item],
    reward: Reward,
    method: Method,
    training: Training,
    optimizer: Optimizer | None = None,
    *,
    normalized: Callable[[M], Reward] | None = None,
    running: RunningReward | None = None,
    seed: int = 0,
) -> Prepared[M]:
    """What trains `tuned` toward the tilt of `model`.

    Args:
        model, tuned: what `trainable` of a model gives.
        items: what samples are asked for; none for an unconditional model.
        training: filled in for this kind of model.
        optimizer: of AdamW and its schedule; by default the method's own.
        normalized: the reward as training sees it, of the untuned model, if it is another.
        running: a running reward along the paths.

    Raises InputError if the method, the model and the settings do not fit.
    """
    check_fit(model, items, method, training)
    try_network(tuned)
    for sentence in few_steps_limits(model, method):
        warnings.warn(sentence, Note, stacklevel=2)
    flow = cast(Flow, tuned.flow)
    adapted = has_adapter(flow.network)
    scored = reward
    if normalized is not None:
        reward = normalized(model)
    dtype = autocast_dtype(training.mixed_precision, model.device)
    flow = replace(flow, autocast=dtype)
    base = base_of(flow) if adapted else replace(cast(Flow, model.flow), autocast=dtype)
    draw = batches(tuned, items, reward, method, training, seed=seed)

    def calibrate(beta: float) -> tuple[Calibration, int]:
        networks = (flow.network, base.network)
        with eval_mode(*networks, reward), CountEvaluations(*networks) as evaluations:
            expected = target_reward(
                base,
                reward,
                beta,
                draw,
                method.sampling,
                training.calibration_samples,
                seed=seed,
                start=model.grid,
                device=model.device,
                non_finite=training.non_finite_rewards,
            )
        return Calibration(expected.value, beta), evaluations.total

    def adapting(resume_from: Tree | None) -> tuple[Temperature | None, int]:
        """What adapts the temperature, if anything does, and the network evaluations that this took."""
        beta = method.temperature
        if beta is None or (training.target_kl is None and not training.calibration_samples):
            return None, 0
        if training.target_kl is not None:
            return KlBudget(training.target_kl, beta, training.max_train_steps), 0
        if resume_from is not None:
            return Calibration(temperature_state(resume_from)["target_reward"], beta), 0
        return calibrate(beta)

    def loop(resume_from: Tree | None = None, **options: Any) -> Generator[Record, None, None]:
        away = offloaded(what_can_be_apart(model, scored, base, training)) if training.offload else nullcontext()
        with (
            tf32(training.allow_tf32, model.device),
            without_cudnn_attention(model.device),
            compiled(training.compile, flow.network, base.network),
            away,
        ):
            if training.compile is not None:
                try_compiled_pair(tuned, flow, base, items, method, training, seed)
            yield from steps(resume_from, **options)

    def steps(resume_from: Tree | None, **options: Any) -> Generator[Record, None, None]:
        temperature, spent = adapting(resume_from)
        yield from train(
            flow,
            base,
            method,
            reward,
            draw,
            max_train_steps=training.max_train_steps,
            optimizer=optimizer,
            seed=seed,
            start=model.grid,
            ema_decay=training.ema_decay,
            micro_batch_size=training.micro_batch_size,
            temperature=temperature,
            network_evaluations=spent,
            adam=eight_bit_adam() if training.use_8bit_adam else adamw,
            max_skipped_steps=training.max_skipped_steps,
            non_finite_rewards=training.non_finite_rewards,
            running=running,
            storage=training.storage,
            resume_from=resume_from,
            **options,
        )

    return Prepared(model, tuned, flow, base, reward, draw, loop)


def what_can_be_apart(model: GenerativeModel, reward: Reward, base: Flow | AdapterOff, training: Training) -> Offload:
    """What `training.offload` keeps on the CPU.

    Args:
        reward: not normalised; the network of one that learns stays where its optimizer is.
        base: with its frozen copy of the network that is tuned, or the adapter of that. Sharded weights stay where they are.
    """
    scorers = [] if isinstance(reward, LearnedReward) else networks_in(reward)
    if isinstance(model, TextToImage):
        scorers.append(model.pipeline.vae)
    network = cast(nn.Module, base.network)
    if processes.count() > 1:
        return Offload(tuple(scorers), None, model.device)
    if not isinstance(base, AdapterOff):
        return Offload(tuple(scorers), network, model.device)
    return Offload(tuple(scorers), None, model.device, network if can_make_room(network, training) else None)


def can_make_room(network: nn.Module, training: Training) -> bool:
    """True if the frozen weights of a network with an adapter can move: not those that are packed, or in compiled code."""
    plain = all(type(parameter) is nn.Parameter for parameter in network.parameters())
    return training.offload and training.compile is None and plain


def asked_of(items: Sequence[Item], held_out: Sequence[Item], settings: Evaluation, count: int | None = None) -> Asked:
    """The samples of an evaluation.

    Args:
        items: the classes that are tuned, if there are any.
        held_out: the prompts that are not, if there are any.
        count: another number of samples than `num_samples`.
    """
    if held_out:
        assert settings.num_generations is not None
        return Asked.of_prompts(held_out[: settings.num_prompts], settings.num_generations)
    count = count or settings.num_samples or 0
    return Asked.of_classes(items, count) if items else Asked.of_samples(count)


def load_asked(recipe: CommonRecipe, device: str) -> tuple[Any, Sequence[Item], Sequence[Item]]:
    """The model of a recipe, what its samples are asked for, and the prompts that are held out.

    Raises InputError for what cannot be had; what is wrong with a file of prompts is said before a large model is loaded.
    """
    asked_for = recipe.asked_for
    known = asked_for.items((), recipe.seed) if isinstance(asked_for, Prompts) else None
    model: Any = recipe.source.load(device)
    return model, *(known or asked_for.items(model.class_names, recipe.seed))


def check_reward(settings: RewardSettings, method: Method) -> None:
    """Raise InputError if the method needs a gradient that the reward does not have, or the reward learns and may not."""
    if method.needs.reward_gradient and not settings.differentiable:
        raise InputError(f"reward {settings.name!r} has no gradient, and method {method.name!r} needs one")
    if settings.learned and not method.needs.learned_reward:
        raise InputError(f"reward {settings.name!r} learns while it is used, which method {method.name!r} cannot do")


def build_reward(settings: RewardSettings, method: Method, device: str, *, decoded: bool = False) -> Reward:
    """A reward by its settings.

    Args:
        decoded: of what a model decodes.

    Raises InputError if the method cannot have this reward, or the reward learns and cannot here.
    """
    check_reward(settings, method)
    if settings.learned and decoded:
        raise InputError(f"reward {settings.name!r} learns from samples, which it cannot from those of a pipeline")
    return settings.build(device)


def eight_bit_adam() -> Callable[..., torch.optim.Optimizer]:
    """AdamW with its state in 8 bits. Raises InputError if bitsandbytes is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise not_installed("training.use_8bit_adam: bitsandbytes", "bitsandbytes") from None
    optimizer: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return optimizer


# ---- what does not fit ----


def check_start(adapter: Adapter | None, method: Method) -> None:
    """Raise InputError if training would start from a LoRA, and the law of the method is counted from the base."""
    if adapter is not None and adapter.continue_from is not None and method.needs.begins_as_base:
        raise InputError(
            f"adapter.continue_from: {method.name} counts its law from the base, as which training must start; take another"
            " method, or make the LoRA a part of the base by model.loras"
        )


def check_warm_start(start: GenerativeModel, adapter: Adapter | None, method: Method) -> None:
    """Raise InputError if training cannot begin with the weights of another model."""
    if not isinstance(start, GenerativeModel):
        raise InputError(f"tune: start must be a model, is {start!r}")
    if adapter is not None:
        raise InputError("tune: start gives the weights of the whole network, which adapter=None trains; give that")
    if method.needs.begins_as_base:
        raise InputError(f"tune: start: {method.name} counts its law from the base, as which training must begin; leave it out")


def check_fit(model: GenerativeModel, items: Sequence[Item], method: Method, training: Training) -> None:
    """Raise InputError, of one line, if the method cannot work with this model and these settings."""
    distinct, size = len(items), training.samples_per_step
    prompts = training.prompts_per_step is not None
    each = training.num_generations if prompts else size // max(1, distinct)
    if why := method.learns_nothing(each or 0):
        fewest = fewest_samples(method)
        if prompts:
            raise InputError(f"training.num_generations {each} teaches nothing: {why}; give {fewest} or more")
        of_class = f", {each} of each class," if distinct else ""
        raise InputError(
            f"training.train_batch_size {size}{of_class} teaches nothing: {why}; give {fewest * max(1, distinct)} or more"
        )
    if training.calibration_samples and method.target(training.max_train_steps, model.grid).beta is None:
        raise InputError(f"training.calibration_samples: {method.name} has no temperature to calibrate; set it to 0")
    check_budget(model, method, training)
    if training.trajectory_dtype is not None and (exact := method.needs.exact_trajectories):
        raise InputError(
            f"training.trajectory_dtype {training.trajectory_dtype}: {exact} weighs paths by their densities, which rounding"
            " changes; leave it out, or use training.trajectory_device cpu"
        )
    if training.calibration_samples and distinct and (prompts is False or distinct > 1):
        one = "prompt" if prompts else "class"
        raise InputError(
            f"training.calibration_samples: there is one working temperature, and each {one} would need its own; set it to 0"
        )
    if distinct > 1 and method.needs.critic_of_condition:
        knows = "the prompt, and ours sees latents alone" if prompts else "the class, and ours does not see labels"
        if isinstance(model, Policy):
            knows = "the observation, and ours sees actions alone"
        raise InputError(
            f"{method.needs.critic_of_condition} needs a critic that knows {knows}; use {method.needs.without_critic}"
        )
    if distinct and not prompts and method.needs.own_data:
        raise InputError("method.data: the images would have to be of the classes that are drawn; leave them out")
    if training.per_prompt_normalization and not distinct:
        raise InputError(
            "training.per_prompt_normalization: this model has neither prompts nor classes; a beta that is larger by the"
            " standard deviation of its rewards does the same"
        )
    if items and training.guidance_mode not in (None, "none") and model.conditions(items[:1])[1] is None:
        raise InputError(
            f"training.guidance_mode {training.guidance_mode}: this model was distilled from guidance and has no negative"
            " prompts; its guidance_scale is an input of the network. Use guidance_mode none"
        )


def check_budget(model: GenerativeModel, method: Method, training: Training) -> None:
    """Raise InputError, of one line, if there is a KL budget and no temperature that it could set."""
    if training.target_kl is None:
        return
    if training.calibration_samples:
        raise InputError("training.target_kl and training.calibration_samples both set the temperature; give one of them")
    why = "works at no temperature that could be adapted" if method.temperature is None else None
    if method.target(training.max_train_steps, model.grid).reaches == "none":
        why = "reaches no tilted law, so that its temperature does not set a KL divergence"
    if why is not None:
        raise InputError(f"training.target_kl: {method.name} with these settings {why}; leave it out")


def check_running_reward(running: RunningReward | None, method: Method, training: Training) -> None:
    """Raise InputError, of one line, if there is a running reward and the method or a setting cannot have one."""
    if running is None:
        return
    if not callable(running):
        raise InputError(f"running_reward must be a function of (x [batch, ..], t []) -> [batch], is {running!r}")
    if not method.needs.running_reward:
        raise InputError(
            f"running_reward: method {method.name!r} rewards the ends of paths alone; use adjoint-matching or score-as-action"
        )
    if training.calibration_samples:
        raise InputError(
            "training.calibration_samples: the calibration is on p_base exp(r / beta), which is not the law with a running"
            " reward; set it to 0"
        )


def try_compiled_pair(
    model: GenerativeModel,
    flow: Flow,
    base: Flow | AdapterOff,
    items: Sequence[Item],
    method: Method,
    training: Training,
    seed: int,
) -> None:
    """Compile the networks of the velocity fields of a tuned model and of its base, as far as calls of a micro-batch do.

    Raises InputError, of one line, if they cannot be compiled here, or compute something else then.
    """
    count = min(training.micro_batch_size or training.samples_per_step, training.samples_per_step)
    some = [items[0] if items else Item("")] * count
    x = model.noise(some, stream(seed, "compile", device=model.device), method.sampling.times(model.grid)[0])
    condition = model.conditions(some)[0] if items else flow.condition
    with eval_mode(flow.network, base.network):
        for field in (flow, base):
            try_compiled(field.bind(condition), field.network, x)


def try_network(model: GenerativeModel) -> None:
    """Raise InputError, of one line, if the network of a model cannot be called as it will be, or learns nothing."""
    if not isinstance(model, Model):  # a pipeline has drawn pictures by now
        return
    flow = model.flow
    x = model.start(2, stream(0, "check", device=model.device))
    with tried(), eval_mode(flow.network), torch.enable_grad():
        v = model.bound(model.example_conditions(2))(x, torch.tensor(0.5))
    if not any(True for _ in flow.parameters()):
        raise InputError("nothing can be trained: no parameter of the network requires a gradient (is the adapter frozen?)")
    if not v.requires_grad:
        raise InputError(
            "nothing can be trained: what the network returns does not depend on its parameters, or is cut off from them by"
            " torch.no_grad() or detach()"
        )
