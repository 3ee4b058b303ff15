"""A training run: a recipe, the loop, and the one folder in which everything that it makes lies.

recipe.yaml, metrics.jsonl, checkpoints/      see `tiltflow.runs.run_folder`; `tiltflow train` on the recipe repeats the run
model/           the tuned model, as `tiltflow.load` reads it
reward.safetensors      the network of a reward that learned along the way
base/            the base model, unless it ships with tiltflow
before.png, after.png, summary.json, report.html      written by the evaluation, from the folder alone
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import BeforeValidator, Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow import __version__, processes
from tiltflow.data import load_images
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.evaluation.estimates import (
    Estimate,
    ImportanceWeights,
    entropy,
    exact_w2,
    frechet_distance,
    histogram_distance,
    histogram_masses,
    in_batches,
    mean_estimate,
    one_hot,
    total_variance,
    total_variation,
)
from tiltflow.evaluation.monitor import Look, look_at, spread, spread_of_target, target_measures
from tiltflow.evaluation.verdict import Row, class_tests, conclude, distance_test, mean_test, of_rewards, share_test
from tiltflow.files import final_name, write_file, write_folder, write_json
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.precision import autocast_dtype
from tiltflow.methods import Tilting
from tiltflow.models.model import ClassifierConfig, Model, load, load_classifier, model_folder, save_weights
from tiltflow.plugins import part_of
from tiltflow.reports.plots import image_grid
from tiltflow.reports.report import write_report
from tiltflow.rewards import LearnedReward, NonFiniteRewards, Reward, evaluate, select, try_reward
from tiltflow.runs.fingerprints import BASE
from tiltflow.runs.prepare import check_fit, items_of, prepare, to_train, told
from tiltflow.runs.run_folder import RunFolder, Watcher, of_monitor, read_records, read_run_tree
from tiltflow.samplers.rollout import path_costs
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Labels, PathOrName, Settings, validate
from tiltflow.shipped import ASSETS
from tiltflow.streams import stream
from tiltflow.training.calibration import LIMIT, gain_at_limit
from tiltflow.training.callbacks import Callback
from tiltflow.training.determinism import deterministic
from tiltflow.training.optimizer import Optimizer, fill_optimizer
from tiltflow.training.settings import Training
from tiltflow.user_code import refused, tried

Count = Annotated[int, Field(ge=1)]
REWARD = "reward.safetensors"
IN_GROUP, CONFIDENCE, VARIETY = "the judge's group", "the judge's confidence", "variety"
"""What a monitor measures beside the reward."""
MOST_W2 = 1024  # points for the exact Wasserstein distance in feature space, whose cost grows with their square


class Evaluation(Settings):
    """What is measured after training, on the base and the tuned model alike."""

    num_samples: Annotated[int, Field(ge=2)] = 1024
    """Of each of the two models."""
    batch_size: Count = 256
    """Samples at a time. It is part of what they depend on."""
    judge: PathOrName | None = None
    """A classifier that was never part of the reward: its class histogram is compared with the target's."""
    group: Labels = ()
    """Classes of the judge to report together."""
    data: PathOrName | None = None
    """Real images, an .npz file or a folder: samples are then compared with them, in the judge's features, by the Frechet
    distance."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """A sample is one that the judge is sure of if its likeliest class has more than this probability."""
    grid: Count = 64
    """Samples in the before and after pictures."""


class Recipe(Settings):
    """A training run, complete."""

    description: str = ""
    """A line for people: it is shown when the run begins, and in its report."""
    model: PathOrName
    """A model that ships with tiltflow, or a model folder."""
    reward: Annotated[Any, BeforeValidator(part_of("rewards"))]
    """What is tuned toward: `tiltflow settings` lists the rewards."""
    method: Annotated[Any, BeforeValidator(part_of("methods"))]
    """How it is tuned: `tiltflow settings` lists the methods."""
    optimizer: Optimizer = Optimizer()
    """AdamW and its schedule."""
    training: Training = Training()
    """The loop."""
    sampling: Sampling = Sampling()
    """How the models are sampled for the evaluation."""
    evaluation: Evaluation = Evaluation()
    """What is measured after training."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed, recipe, software and machine give the same result, bit for bit."""

    @model_validator(mode="after")
    def _teaches(self) -> Recipe:
        training = self.training.for_samples()
        object.__setattr__(self, "training", training)
        object.__setattr__(self, "optimizer", fill_optimizer(self.method, self.optimizer))
        if why := self.method.learns_nothing(training.train_batch_size):
            raise ValueError(f"training.train_batch_size {training.train_batch_size} teaches nothing: {why}; give 2 or more")
        return self


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
    `training.resume_from_checkpoint` the run that is in the folder goes on.

    Args:
        note: is told what a person should know about where a run goes on from, and of alarms.
        handle_signals: whether signals (`tiltflow.training.signals`) end the training, with a checkpoint and the weights saved.

    On KeyboardInterrupt the tuned weights of that moment are saved before it is raised again; `evaluate_run` then works.
    Raises InputError, with nothing written, if the folder is occupied, cannot be written to or has no room, or a part of the
    recipe cannot be had; Interrupted after such a signal; NonFiniteError, CheckpointError and OutputError.
    """
    with deterministic(recipe.training.deterministic), RunFolder.begin(folder, recipe, note) as place:
        recipe = place.recipe
        base = load(recipe.model, device)
        reward = build_reward(recipe.reward, recipe.method, device)
        rehearse(recipe, base, reward, device)

        began = time.perf_counter()
        base, tuned = to_train(base, recipe.training)
        items = items_of(base, recipe.training)
        loop = prepare(base, tuned, items, reward, recipe.method, recipe.training, recipe.optimizer, seed=recipe.seed).loop
        source = model_folder(recipe.model)
        kept = folder / BASE
        place.check_room(
            sum(parameter.nbytes for parameter in tuned.flow.parameters()),
            model=sum(tensor.nbytes for tensor in cast(nn.Module, tuned.flow.network).state_dict().values()),
            copied=0 if source.is_relative_to(ASSETS) or kept.exists() else sum(p.stat().st_size for p in source.iterdir()),
        )

        def keep_base() -> None:
            if not source.is_relative_to(ASSETS) and not kept.exists():
                write_folder(kept, lambda draft: shutil.copytree(source, draft, dirs_exist_ok=True))

        def write(to: Path) -> None:
            if isinstance(reward, LearnedReward):
                write_file(folder / REWARD, partial(save_weights, reward.network))
            tuned.save(to, model_card(recipe))

        save = partial(place.save, cast(nn.Module, tuned.flow.network), write)
        watcher = None
        if recipe.training.monitor is not None:
            watcher = make_watcher(recipe, base, tuned, reward, partial(save, to="best"), device)
        place.train(loop, save, callbacks=callbacks, before=keep_base, watcher=watcher, handle_signals=handle_signals)
        summary = evaluate_run(folder, device=device, seconds=time.perf_counter() - began)
        place.end(summary)
        return summary


@torch.no_grad()
def make_watcher(
    recipe: Recipe, base: Model, tuned: Model, reward: Reward, save_best: Callable[[], None], device: str
) -> Watcher:
    """How the recipe's monitor looks at the model: the reward, and what a judge sees that was never part of it.

    Raises InputError for a reward that learns."""
    settings, monitor = recipe.evaluation, recipe.training.monitor
    assert monitor is not None
    if isinstance(reward, LearnedReward):
        raise InputError("training.monitor: the reward learns along the way, so looks at it cannot be compared; leave it out")
    dtype = autocast_dtype(recipe.training.mixed_precision, device)
    labels = evaluation_labels(base, recipe.training, monitor.num_samples)
    count, classes = (monitor.num_samples, 1) if labels is None else (len(labels), len(labels.unique()))
    network = build_judge(settings, device)[0] if settings.judge is not None else None
    best_by = VARIETY if network is None else IN_GROUP if settings.group else CONFIDENCE

    def measure(model: Model) -> tuple[dict[str, Tensor], Tensor]:
        model = replace(model, flow=replace(model.flow, autocast=dtype))
        seed = stream(recipe.seed, "monitor").initial_seed()  # other noise than the evaluation's
        x = model.sample(count, labels=labels, seed=seed, sampling=recipe.sampling, batch_size=settings.batch_size)
        asked = reward if labels is None else told(reward, base.items_of(labels.tolist()))
        x, rewards, _ = scored(asked, x, settings.batch_size, device, recipe.training.non_finite_rewards, classes)
        found, features = {"reward": rewards}, x.flatten(1)
        if network is not None:
            p = in_batches(lambda part: network(part).softmax(1), x, settings.batch_size, device)
            if settings.group:
                found[IN_GROUP] = p[:, list(settings.group)].sum(1)
            found[CONFIDENCE] = p.amax(1)
            features = in_batches(cast(Callable[[Tensor], Tensor], network.features), x, settings.batch_size, device)
        return found, features

    def look(step: int) -> Look:
        found, features = measure(tuned)
        return look_at(step, found | {VARIETY: spread(features)})

    of_base, features = measure(base)
    tilt = recipe.method.log_tilt(of_base["reward"], recipe.training.max_train_steps)
    return Watcher(
        first=look_at(0, of_base | {VARIETY: spread(features)}),
        look=look,
        save_best=save_best,
        best_by=best_by,
        target=target_measures(of_base | {VARIETY: spread_of_target(features, tilt, classes)}, tilt, classes),
    )


def evaluate_run(
    folder: Path,
    *,
    device: str = "cpu",
    num_samples: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure a finished (or interrupted) run from its folder alone; writes summary.json, the pictures and report.html."""
    recipe = read_recipe(folder)
    settings = recipe.evaluation
    count = settings.num_samples if num_samples is None else num_samples
    base = load(folder / BASE if (folder / BASE).exists() else recipe.model, device)
    tuned = load(folder / "model", device)
    reward = build_reward(recipe.reward, recipe.method, device)
    if isinstance(reward, LearnedReward):
        with refused(f"{folder / REWARD}: is not the network of the reward"):
            reward.network.load_state_dict(load_file(folder / REWARD, device=device))
    began = time.perf_counter()

    dtype = autocast_dtype(recipe.training.mixed_precision, device)
    base, tuned = (replace(model, flow=replace(model.flow, autocast=dtype)) for model in (base, tuned))
    labels = evaluation_labels(base, recipe.training, count)
    classes = [] if labels is None else labels.unique().tolist()
    count = count if labels is None else len(labels)
    asked = reward if labels is None else told(reward, base.items_of(labels.tolist()))
    samples = (
        model.sample(count, labels=labels, seed=recipe.seed, sampling=recipe.sampling, batch_size=settings.batch_size)
        for model in (base, tuned)
    )
    (x_base, r_base, left_out_of_base), (x, r, left_out) = (
        scored(asked, y, settings.batch_size, device, recipe.training.non_finite_rewards, max(1, len(classes))) for y in samples
    )
    rows = read_records(folder)
    taken = rows[-1]["step"]
    tilt = recipe.method.log_tilt(r_base, taken)
    weights = ImportanceWeights.from_log_tilt(tilt, max(1, len(classes)), strata=True)
    generator = stream(recipe.seed, "bootstrap")
    calibrated = calibration_in_words(getattr(recipe.method, "beta", None), rows[-1].get("beta"))
    # a gain at its limit has not made the mean reward what it should be
    counted = calibrated["calibration_at_limit"] is not False
    of_reward, tests = of_rewards(r, r_base, weights, generator, counted=counted, group="class")
    if len(classes) > 1 and tests:
        tests += of_classes(r, r_base, tilt, [base.class_names[label] for label in classes])

    summary: dict[str, Any] = {
        "tiltflow": __version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "name": final_name(folder),
        "description": recipe.description,
        "model": recipe.model,
        "method": recipe.method.name,
        "beta": getattr(recipe.method, "beta", None),
        "working_beta": rows[-1].get("beta"),
        "calibration_at_limit": calibrated["calibration_at_limit"],
        "target_law": recipe.method.target_law(taken),
        "limits": [
            *recipe.method.limits(base.flow.noise_time),
            *calibrated["limits"],
            *left_out_in_words(left_out_of_base, left_out, count),
        ],
        "reward": recipe.reward.name,
        "reward_description": recipe.reward.description,
        "iterations": taken,
        "max_train_steps": recipe.training.max_train_steps,
        "seed": recipe.seed,
        "num_samples": count,
        **mean_estimate(r_base).named("reward_base"),
        **mean_estimate(r).named("reward_tuned"),
        **of_reward,
        "judge": None,
        **path_kl(recipe, tuned, base, labels),
        "seconds": rows[-1]["seconds"],
        "network_evaluations": rows[-1]["network_evaluations"],
        "samples_drawn": rows[-1].get("samples_drawn"),
        **of_monitor(folder),
    }
    if settings.judge is None:
        summary |= distance_to_base(x.flatten(1), x_base.flatten(1), "samples")
    else:
        of_judge, its_tests = judged(settings, x_base, x, weights, generator, device)
        summary, tests = summary | of_judge, tests + its_tests
    if hasattr(recipe.method, "balance"):
        generator, start = stream(recipe.seed, "balance", device=device), base.flow.noise_time
        kept = None if labels is None else torch.tensor(classes).repeat_interleave(len(x) // len(classes))
        bound = (model.bound(kept) for model in (tuned, base))
        balance = recipe.method.balance(*bound, x, r, generator, start=start, batch_size=settings.batch_size)
        if balance is not None:
            summary |= balance.named("own_law_balance") | {"own_law_balance_expected": recipe.method.balance_expected(taken)}
    summary |= conclude(tests, summary)
    summary["seconds_total"] = (seconds or rows[-1]["seconds"]) + time.perf_counter() - began

    columns = len(classes) if len(classes) > 1 else max(1, round(settings.grid**0.5))
    of_images = len(base.event_shape) == 3 and base.event_shape[0] in (1, 3)
    if of_images:
        summary["pictures"] = {"rows": math.ceil(min(settings.grid, count) / columns)}
    if not processes.is_main():
        return summary
    if of_images:
        if len(classes) > 1:  # a column for each class
            x_base, x = (each.unflatten(0, (columns, -1)).transpose(0, 1).flatten(0, 1) for each in (x_base, x))
        for name, images in (("before.png", x_base), ("after.png", x)):
            write_file(folder / name, partial(image_grid(images[: settings.grid], columns).save, format="png"))
    write_json(folder / "summary.json", summary)
    write_report(folder)
    return summary


def evaluation_labels(model: Model, training: Training, count: int) -> Tensor | None:
    """Labels of about so many samples of a class-conditional model: as many of each class that is tuned, one class after
    another; None for another model."""
    if not model.class_names:
        return None
    classes = tuple(sorted(training.classes)) or tuple(range(len(model.class_names)))
    return torch.tensor(classes).repeat_interleave(max(2, count // len(classes)))


@torch.no_grad()
def scored(
    reward: Reward, x: Tensor, batch_size: int, device: str, non_finite: NonFiniteRewards, classes: int = 1
) -> tuple[Tensor, Tensor, int]:
    """(samples, their rewards, how many have none), for samples x [n, *event]: with `drop`, those whose reward is NaN or
    infinite are left out, and of each of so many classes, one after another, as many are kept as of the others.

    Raises NonFiniteError if there are such and they are not to be dropped, or if fewer than two of a class are left.
    """
    found = [evaluate(select(reward, part), x[part].to(device), non_finite) for part in processes.shares(len(x), batch_size)]
    rewards = processes.gathered(found, len(x)).cpu()
    finite = rewards.isfinite().reshape(classes, -1)
    if finite.all():
        return x, rewards, 0
    bad, size = int((~finite).sum()), int(finite.sum(1).min())
    if size < 2:
        raise NonFiniteError(f"the reward is not finite for {bad} of {len(x)} samples")
    kept = (finite & (finite.cumsum(1) <= size)).flatten()
    return x[kept], rewards[kept], bad


def left_out_in_words(of_base: int, of_tuned: int, count: int) -> list[str]:
    """The sentence that says which samples the numbers of a summary are not of, if any."""
    if not of_base and not of_tuned:
        return []
    return [
        f"Samples whose reward is not finite, {of_base} of the base's {count} and {of_tuned} of the tuned model's, are left out"
        " of every number: the laws are those of the others."
    ]


def of_classes(rewards: Tensor, base_rewards: Tensor, tilt: Tensor, names: Sequence[str]) -> list[Row]:
    """A test of the mean reward of each class, of samples that come one class after another, where its target law is known.

    Args:
        tilt: the log weights of the base samples [n].
    """
    found, parts = [], zip(*(each.chunk(len(names)) for each in (rewards, base_rewards, tilt)), strict=True)
    for name, (tuned, base, of_class) in zip(names, parts, strict=True):
        weights = ImportanceWeights.from_log_tilt(of_class)
        if weights.unknown() is None:
            found.append(mean_test(f"mean reward of class {name}", tuned, base, weights))
    return found


def calibration_in_words(beta: float | None, working_beta: float | None) -> dict[str, Any]:
    """Of a run that worked at `working_beta` at its end: whether that is at its limit (`calibration_at_limit`, None if it was
    not calibrated), and the sentence that says so (`limits`)."""
    if beta is None or working_beta is None:
        return {"calibration_at_limit": None, "limits": []}
    at_limit = gain_at_limit(beta / working_beta)
    sentence = (
        f"Calibration ended at its limit: the run worked at a temperature of {working_beta:.3g} where {beta:g} was asked for,"
        f" and it may not be more than {LIMIT:g} times lower or higher. The mean reward is then not made right: the run is far"
        " from converged, or its sampler cannot reach the target."
    )
    return {"calibration_at_limit": at_limit, "limits": [sentence] if at_limit else []}


MOST_PATHS = 256
"""For the path KL, each of which costs as much as two samples."""


@torch.no_grad()
def path_kl(recipe: Recipe, tuned: Model, base: Model, labels: Tensor | None = None) -> dict[str, Any]:
    """`path_kl` of the summary, fresh and with its standard error: of the memoryless samplers of both models, on the grid that
    the evaluation samples on. None, and `path_kl_absent` says why, for a method that tunes a solver without noise."""
    start, tuned_chain = base.flow.noise_time, recipe.method.sampling
    if isinstance(recipe.method, Tilting) and not tuned_chain.has_noise:
        return dict.fromkeys(("path_kl", "path_kl_error")) | {"path_kl_absent": tuned_chain.limits(start)[0]}
    steps = max(2, recipe.sampling.num_inference_steps)  # the last one is not controlled
    chain = Sampling(num_inference_steps=steps, shift=recipe.sampling.shift).chain(start)
    generator = stream(recipe.seed, "path kl", device=base.device)
    count = max(2, min(MOST_PATHS, recipe.evaluation.num_samples))
    if labels is not None:
        classes = labels.unique()
        labels = classes.repeat_interleave(max(1, count // len(classes)))
        count = len(labels)
    x = base.start(count, generator)
    ours, theirs = (in_chunks(model.bound(labels), recipe.evaluation.batch_size) for model in (tuned, base))
    return {**mean_estimate(path_costs(chain, ours, theirs, x, generator)).named("path_kl"), "path_kl_absent": None}


def judged(
    settings: Evaluation, x_base: Tensor, x: Tensor, weights: ImportanceWeights, generator: torch.Generator, device: str
) -> tuple[dict[str, Any], list[Row]]:
    """What an independent classifier sees: class histograms of base, tuned and target, their total variation, and tests of all
    of it against the target. What is of the target is None where that is not known."""
    network, config = build_judge(settings, device)
    names = config.class_names
    with torch.no_grad():
        p_base, p = (in_batches(lambda part: network(part).softmax(1), y, settings.batch_size, device) for y in (x_base, x))
    labels_base, labels = p_base.argmax(1), p.argmax(1)
    base_histogram, ours = (one_hot(each, len(names)).mean(0) for each in (labels_base, labels))
    sure_base, sure = ((each.amax(1) > settings.confidence).double() for each in (p_base, p))
    judge: dict[str, Any] = {
        "model": settings.judge,
        "class_names": list(names),
        "base": base_histogram.tolist(),
        "tuned": ours.tolist(),
        "target": None,
        "target_error": None,
        "sure_above": settings.confidence,
        **mean_estimate(sure_base).named("sure_base"),
        **mean_estimate(sure).named("sure_tuned"),
        "confidence_base": p_base.amax(1).mean().item(),
        "confidence_tuned": p.amax(1).mean().item(),
    }
    members = torch.tensor(settings.group, dtype=torch.long)
    of_group, of_group_base = (torch.isin(each, members).double() for each in (labels, labels_base))
    label = ", ".join(names[i] for i in settings.group)
    if settings.group:
        judge["group"] = {
            "label": label,
            "base": of_group_base.mean().item(),
            **mean_estimate(of_group).named("tuned"),
            "target": None,
            "target_error": None,
        }
    features = cast(Callable[[Tensor], Tensor], network.features)
    f_base, f = (in_batches(features, y, settings.batch_size, device) for y in (x_base, x))
    judge |= {
        "entropy_base": entropy(base_histogram),
        "entropy_tuned": entropy(ours),
        "variance_base": total_variance(f_base),
        "variance_tuned": total_variance(f),
    }
    if settings.data is not None:
        f_real = in_batches(features, evaluation_images(settings), settings.batch_size, device)
        judge["frechet_base"], judge["frechet_tuned"] = frechet_distance(f_base, f_real), frechet_distance(f, f_real)
        judge["frechet_real"] = frechet_distance(*f_real.chunk(2))
    entries = {**distance_to_base(f, f_base, f"features of {settings.judge}"), "judge": judge}
    if weights.unknown() is not None:
        return entries, []

    distance, _, target = histogram_distance(labels, labels_base, weights, len(names), generator)
    of_base = total_variation(base_histogram, target)
    null = weights.null_distances(len(labels), [histogram_masses(labels_base, len(names))], generator)[0]
    judge |= {"target": target.tolist(), "target_error": weights.mean(one_hot(labels_base, len(names)))[1].tolist()}
    group_test = share_test(f"share of classes {label}", of_group, of_group_base, weights) if settings.group else None
    if settings.group:
        share, error = map(float, weights.mean(of_group_base))
        judge["group"] |= Estimate(share, error).named("target")
    tests = [
        group_test,
        *class_tests(labels, labels_base, weights, names, settings.group),
        share_test(f"share of which the judge is sure above {settings.confidence:g}", sure, sure_base, weights),
        distance_test("total variation of the classes", distance.value, of_base, null),
    ]
    entries |= {
        **distance.named("target_distance"),
        "target_distance_base": of_base,
        "target_distance_floor": null.mean().item(),
        "target_distance_kind": "total variation of the judge's class histogram to the importance-weighted base's",
    }
    return entries, [row for row in tests if row is not None]


def distance_to_base(tuned: Tensor, base: Tensor, space: str) -> dict[str, Any]:
    """2-Wasserstein distance between tuned and base samples [n, d] of different noise, and the same between two halves of the
    base, which is what finite samples leave."""
    half = min(len(base) // 2, MOST_W2)
    return {"w2_base": exact_w2(tuned[:half], base[-half:]), "w2_floor": exact_w2(base[:half], base[-half:]), "w2_space": space}


def evaluation_images(settings: Evaluation) -> Tensor:
    """Up to 10,000 of the real images that samples are compared with."""
    assert settings.data is not None
    return load_images(Path(settings.data), "test").images[:10_000]


def build_reward(settings: Any, method: Any, device: str) -> Reward:
    """A reward by its settings. Raises InputError if the method needs a gradient that the reward does not have."""
    if getattr(method, "needs_reward_gradient", False) and not settings.differentiable:
        raise InputError(f"reward {settings.name!r} has no gradient, and method {method.name!r} needs one")
    if getattr(settings, "learned", False) and not getattr(method, "learns_reward", False):
        raise InputError(f"reward {settings.name!r} learns while it is used, which method {method.name!r} cannot do")
    reward: Reward = settings.build(device)
    return reward


def build_judge(settings: Evaluation, device: str) -> tuple[nn.Module, ClassifierConfig]:
    """The judge of a recipe that has one. Raises InputError if it does not know a class of the group."""
    assert settings.judge is not None
    network, config = load_classifier(settings.judge, device)
    if settings.group and max(settings.group) >= len(config.class_names):
        raise InputError(
            f"evaluation.group names class {max(settings.group)}, the judge knows 0 to {len(config.class_names) - 1}"
        )
    return network, config


def rehearse(recipe: Recipe, base: Model, reward: Reward, device: str) -> None:
    """Try on two samples of the base all that the training and the evaluation will need of others. Raises InputError, of one
    line, for what does not work: now, and not after the training."""
    settings = recipe.evaluation
    check_fit(base, items_of(base, recipe.training), recipe.method, recipe.training)
    labels = evaluation_labels(base, recipe.training, 2)
    if labels is not None:
        labels = labels[:2]
        reward = told(reward, base.items_of(labels.tolist()))
    with tried():
        x = base.sample(2, labels=labels, seed=recipe.seed, sampling=recipe.sampling).to(device)
    gradient = getattr(recipe.method, "needs_reward_gradient", False)
    try_reward(reward, x, gradient=gradient, non_finite=recipe.training.non_finite_rewards)
    if settings.judge is None:
        if settings.data is not None:
            raise InputError("evaluation.data: the comparison is in the features of a judge; set evaluation.judge too")
        return
    judge = build_judge(settings, device)[0]
    seen = (
        {"samples": x}
        if settings.data is None
        else {"samples": x, "evaluation.data": evaluation_images(settings)[:2].to(device)}
    )
    for name, images in seen.items():
        try:
            with torch.no_grad():
                judge(images)
                cast(Callable[[Tensor], Tensor], judge.features)(images)
        except RuntimeError as error:  # torch's word for a wrong shape
            raise InputError(
                f"evaluation.judge does not take {name} of shape {list(images.shape[1:])}: {str(error).splitlines()[0]}"
            ) from None


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run. Raises InputError if `folder` is not a run with a tuned model."""
    return validate(Recipe, read_run_tree(folder), str(folder / "recipe.yaml"))


def model_card(recipe: Recipe) -> str:
    """README.md of a tuned model."""
    steps = recipe.training.max_train_steps
    aim = recipe.method.target_law(steps)
    if (beta := getattr(recipe.method, "beta", None)) is not None:
        aim += f", beta = {beta:g}"
    return (
        f"# {recipe.model} tuned by {recipe.method.name}\n\n{recipe.description}\n\n"
        f"Base: `{recipe.model}`. Reward: {recipe.reward.description}. Aims at {aim}; "
        f"seed {recipe.seed}, up to {steps} steps. The complete recipe is `recipe.yaml` of the run.\n"
    )
