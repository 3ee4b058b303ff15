"""A training run: a recipe, the loop, and the one folder in which everything that it makes lies.

recipe.yaml, metrics.jsonl, checkpoints/      see `tiltflow.runs.run_folder`; `tiltflow train` on the recipe repeats the run
model/           the tuned model, as `tiltflow.load` reads it: a model folder; of a pipeline the adapter,
                 pytorch_lora_weights.safetensors as diffusers loads it, or the whole denoiser
reward.safetensors      the network of a reward that learned along the way
base/            the base model, unless it ships with tiltflow or is a pipeline
before.png, after.png, summary.json, report.html      written by the evaluation, from the folder alone; of videos before.gif and
                 after.gif too, of molecules before.xyz and after.xyz
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import nn

from tiltflow.conditions import Item
from tiltflow.control.objective import RunningReward
from tiltflow.errors import InputError
from tiltflow.evaluation.metrics import every_metric
from tiltflow.evaluation.samples import Asked, Instruments
from tiltflow.evaluation.settings import Point
from tiltflow.files import write_file
from tiltflow.flows.precision import autocast_dtype
from tiltflow.models.model_folder import save_weights
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards import LearnedReward, Reward
from tiltflow.runs.evaluate import evaluate
from tiltflow.runs.fingerprints import BASE, check_unchanged
from tiltflow.runs.looks import Watcher
from tiltflow.runs.prepare import (
    Prepared,
    asked_of,
    build_reward,
    check_fit,
    check_running_reward,
    check_start,
    load_asked,
    prepare,
)
from tiltflow.runs.recipe import Recipe, RunSettings, read_one_run
from tiltflow.runs.rehearse import rehearse
from tiltflow.runs.run_files import RECIPE, read_run_tree
from tiltflow.runs.run_folder import RunFolder
from tiltflow.runs.watch import make_watcher
from tiltflow.training.base_statistics import normalizer
from tiltflow.training.callbacks import Callback
from tiltflow.training.determinism import deterministic
from tiltflow.user_code import refused

REWARD = "reward.safetensors"


@dataclass(frozen=True)
class Ready:
    """A run that can begin.

    Args:
        parts: the loop, and what it trains.
        instruments: what samples are measured with.
        asked, looked_at: the samples of the evaluation, and of a monitor's looks.
    """

    parts: Prepared[Any]
    instruments: Instruments
    asked: Asked
    looked_at: Asked

    def watcher(self, run: RunSettings, save_best: Callable[[], None]) -> Watcher | None:
        """How the run's monitor looks at the model, if it has one."""
        if run.training.monitor is None:
            return None
        untuned, tuned = self.in_precision(run)
        return make_watcher(run, untuned, tuned, self.instruments, self.looked_at, save_best)

    def in_precision(self, run: RunSettings) -> tuple[GenerativeModel, GenerativeModel]:
        """The base and the tuned model, as the training evaluates them."""
        parts = self.parts
        dtype = autocast_dtype(run.training.mixed_precision, parts.tuned.device)
        return parts.untuned.in_precision(dtype), parts.tuned.in_precision(dtype)


def make_ready(
    run: RunSettings,
    model: GenerativeModel,
    trainable: Callable[[], tuple[GenerativeModel, GenerativeModel]],
    reward: Reward,
    items: Sequence[Item],
    held_out: Sequence[Item],
    *,
    rehearsed: bool = True,
    running: RunningReward | None = None,
) -> Ready:
    """Put a run together, and try all that it will need of others.

    Args:
        trainable: gives the base and what is going to be trained, once it is known that all fits: it may change the model.
        items: the prompts or classes that are tuned, if there are any.
        held_out: the prompts that are measured.
        rehearsed: whether samples are drawn first, to try what will look at them.
        running: a running reward along the paths; see `tiltflow.control.objective`.

    Raises InputError, of one line, for what cannot be had, does not fit or does not work.
    """
    settings, training, device = run.evaluation, run.training, str(model.device)
    check_fit(model, items, run.method, training)
    check_running_reward(running, run.method, training)
    instruments = Instruments.build(reward, run.reward_name, settings, device, training.non_finite_rewards)
    every_metric()  # imported now: an evaluation must not meet source files that change while it trains
    asked = asked_of(items, held_out, settings)
    count = training.monitor.num_samples if training.monitor is not None else None
    if isinstance(model, TextToImage):
        model.encode_ahead([*items, *asked.items])
    if rehearsed:
        rehearse(model, next(iter(items), asked.items[0]), asked, instruments, run.method, settings, run.seed)
    normalized = normalizer(training, run.method.sampling, reward, run.seed)
    parts = prepare(
        *trainable(),
        items,
        reward,
        run.method,
        training,
        run.optimizer,
        normalized=normalized,
        running=running,
        seed=run.seed,
    )
    return Ready(parts, instruments, asked, asked_of(items, held_out, settings, count))


def ready(recipe: Recipe, device: str) -> Ready:
    """Load what a recipe names, and try it. Raises InputError, of one line, for what cannot be had or does not work."""
    check_start(recipe.source.adapter, recipe.method)
    model, items, held_out = load_asked(recipe, device)
    reward = build_reward(recipe.reward, recipe.method, device, decoded=model.has_decoder)
    trainable = partial(model.trainable, recipe.source.adapter, recipe.training.trainable, seed=recipe.seed)
    return make_ready(recipe, model, trainable, reward, items, held_out)


def run(
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    callbacks: Sequence[Callback] = (),
    note: Callable[[str], None] = lambda text: None,
    handle_signals: bool = False,
) -> dict[str, Any]:
    """Train by `recipe` into `folder`, which must be new or empty, and evaluate. Returns the summary. With
    `training.resume_from_checkpoint` it resumes the run that is in the folder.

    Args:
        note: is told what a person should know about where a run resumes from, and of alarms.
        handle_signals: whether signals (`tiltflow.training.signals`) end the training, with a checkpoint and the weights saved.

    On KeyboardInterrupt the tuned weights of that moment are saved before it is raised again; `evaluate_run` then works.
    Raises InputError, with nothing written, if the folder is occupied, cannot be written to or has no room, or a part of the
    recipe cannot be had; Interrupted after such a signal; NonFiniteError, CheckpointError and OutputError.
    """
    with deterministic(recipe.training.deterministic), RunFolder.begin(folder, recipe, note) as place:
        recipe = place.recipe
        these, source = ready(recipe, device), recipe.source
        return train(
            recipe,
            these,
            place,
            save_to=partial(these.parts.tuned.save, card=model_card(recipe)),
            copied=source.bytes_to_keep(folder / BASE),
            before=lambda: source.keep(folder / BASE),
            callbacks=callbacks,
            handle_signals=handle_signals,
        )


def train(
    settings: RunSettings,
    these: Ready,
    place: RunFolder[Any],
    *,
    save_to: Callable[[Path], None],
    copied: int = 0,
    before: Callable[[], None] = lambda: None,
    callbacks: Sequence[Callback] = (),
    handle_signals: bool = False,
) -> dict[str, Any]:
    """Train into a folder, and evaluate. Returns the summary.

    Args:
        save_to: writes what was tuned into a folder.
        copied: bytes of what `before` writes, in the main process, when the first step has shown that the run works.
    """
    began, parts = time.perf_counter(), these.parts
    network = cast(nn.Module, parts.tuned.flow.network)
    trained = sum(parameter.nbytes for parameter in parts.flow.parameters())
    whole = trained if parts.tuned.has_decoder else sum(tensor.nbytes for tensor in network.state_dict().values())
    place.check_room(trained, model=whole, copied=copied)

    def write(to: Path) -> None:
        reward = these.instruments.rewards[these.instruments.own]
        if isinstance(reward, LearnedReward):
            write_file(place.path / REWARD, partial(save_weights, reward.network))
        save_to(to)

    save = partial(place.save, network, write)
    watcher = these.watcher(settings, partial(save, to="best"))
    place.train(parts.loop, save, callbacks=callbacks, before=before, watcher=watcher, handle_signals=handle_signals)
    seconds = time.perf_counter() - began
    models = these.in_precision(settings)
    summary = evaluate(settings, place.path, *models, these.asked, these.instruments, seconds=seconds)
    place.end(summary)
    return summary


# ---- a run that is there ----


def evaluate_run(folder: Path, *, device: str = "cpu", num_samples: int | None = None) -> dict[str, Any]:
    """Measure a finished (or interrupted) run from its folder alone; writes summary.json, the pictures and report.html.

    Raises InputError if `folder` is no run with a tuned model, and for `num_samples` of a run with prompts.
    """
    recipe = read_run(folder)
    if recipe.training.prompts_per_step is not None and num_samples is not None:
        raise InputError("num_samples: a run of a pipeline has evaluation.num_prompts and num_generations instead")
    check_unchanged(folder, recipe)
    models = load_models(recipe, folder, device)
    reward = reward_of_run(recipe, folder, device)
    settings, training = recipe.evaluation, recipe.training
    instruments = Instruments.build(reward, recipe.reward_name, settings, device, training.non_finite_rewards)
    items, held_out = recipe.asked_for.items(models[0].class_names, recipe.seed)
    asked = asked_of(items, held_out, settings, num_samples)
    if isinstance(models[0], TextToImage):
        models[0].encode_ahead(asked.items)
    dtype = autocast_dtype(training.mixed_precision, device)
    base, tuned = (model.in_precision(dtype) for model in models)
    return evaluate(recipe, folder, base, tuned, asked, instruments)


def reward_of_run(recipe: Recipe, folder: Path, device: str = "cpu") -> Reward:
    """The reward of a run, with what it has learned. Raises InputError if it cannot be loaded."""
    reward = build_reward(recipe.reward, recipe.method, device)
    if isinstance(reward, LearnedReward):
        with refused(f"{folder / REWARD}: is not the network of the reward"):
            reward.network.load_state_dict(load_file(folder / REWARD, device=device))
    return reward


def read_run(folder: Path) -> Recipe:
    """The recipe of a run. Raises InputError if `folder` is not a run with a tuned model."""
    return read_one_run(read_run_tree(folder), str(folder / RECIPE))


def load_run(recipe: Recipe, folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """(base, tuned) of a run, two `GenerativeModel`s of one kind; those with an adapter may share their network.

    Raises InputError if the base is not the one that was tuned, and that is not accepted.
    """
    check_unchanged(folder, recipe, only="model")
    return load_models(recipe, folder, device)


def load_models(recipe: Recipe, folder: Path, device: str) -> tuple[Any, Any]:
    """`load_run`, whose base is known to be the one that was tuned."""
    source = recipe.source.kept_in(folder / BASE)
    model = source.load(device)
    return source.load_tuned(model, folder / "model", recipe.seed)


def load_tuned(run: str | Path, device: str = "cpu") -> Any:
    """The tuned model of a run, of any kind, to sample from: by default as the first point of the evaluation says.

    Raises InputError if it is no such run or its base cannot be had.
    """
    recipe = read_run(Path(run))
    _, tuned = load_run(recipe, Path(run), device)
    return sampled_at(recipe.evaluation.first, tuned)


def sampled_at(point: Point, model: Any) -> Any:
    """The model with the sampling and the guidance of a point as its own."""
    scale = {} if point.guidance_scale is None else {"guidance_scale": point.guidance_scale}
    return replace(model, sampling=point.sampling, **scale)


def load_text_to_image(run: str | Path, device: str = "cpu") -> TextToImage:
    """`load_tuned` of a run of a pipeline: `load_text_to_image("runs/ir").sample(["a red cat"])`.

    Raises InputError if it is no such run or its base cannot be had.
    """
    if not isinstance(read_run(Path(run)).source, Diffusers):
        raise InputError(f"{run}: not a run of a diffusers pipeline; `tiltflow.load` reads its model")
    return cast(TextToImage, load_tuned(run, device))


def model_card(recipe: Recipe) -> str:
    """README.md of a tuned model."""
    steps = recipe.training.max_train_steps
    target = recipe.method.target(steps)
    beta, budget = target.beta, recipe.training.target_kl
    price = f", with a KL budget of {budget:g} nats" if budget else "" if beta is None else f", beta = {beta:g}"
    aim = "no law that is known" if target.reaches == "none" else target.words + price
    return (
        f"# {recipe.model_name} tuned by {recipe.method.name}\n\n{recipe.description}\n\n"
        f"Base: `{recipe.model_name}`. Reward: {recipe.reward.description}. Aims at {aim}; "
        f"seed {recipe.seed}, up to {steps} steps. The complete recipe is `recipe.yaml` of the run.\n"
    )
