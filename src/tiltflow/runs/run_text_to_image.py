"""A training run of a text-to-image pipeline: a recipe whose model is `{diffusers: PATH_OR_ID}`, and the folder it makes.

recipe.yaml, metrics.jsonl, checkpoints/      see `tiltflow.runs.run_folder`; `tiltflow train` on the recipe repeats the run
model/           the adapter, pytorch_lora_weights.safetensors as diffusers loads it, or the whole denoiser
before.png, after.png, summary.json, report.html      written by the evaluation, from the folder and the base alone
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from tiltflow import __version__, processes
from tiltflow.conditions.prompts import Prompt, Prompts, key_of, read_prompts
from tiltflow.data import load_images
from tiltflow.errors import InputError, NonFiniteError, did_you_mean
from tiltflow.evaluation.estimates import Estimate, ImportanceWeights, effective_number
from tiltflow.evaluation.features import Features, distances_to_reference, feature_extractor, features_of
from tiltflow.evaluation.monitor import Look, look_at, over_groups, spread
from tiltflow.evaluation.verdict import conclude, mean_test, of_rewards
from tiltflow.files import final_name, write_file, write_json, write_text
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.flow import Flow
from tiltflow.methods import Tilting
from tiltflow.models.pipeline_folder import check_numbers
from tiltflow.models.text_to_image import (
    GuidanceMode,
    TextToImage,
    from_diffusers,
    load_pipeline,
    load_tuned,
    save_tuned,
    with_adapter,
)
from tiltflow.plugins import part_of
from tiltflow.reports.plots import image_grid
from tiltflow.reports.report import write_report
from tiltflow.rewards import Metadata, NonFiniteRewards, PerPrompt, Reward, evaluate, shared, try_reward
from tiltflow.runs.fingerprints import check_unchanged
from tiltflow.runs.prepare import Prepared, check_fit, prepare, told
from tiltflow.runs.recipe import is_text_to_image
from tiltflow.runs.run import VARIETY, build_reward, calibration_in_words, left_out_in_words
from tiltflow.runs.run_folder import RunFolder, Watcher, of_monitor, read_records, read_run_tree
from tiltflow.samplers.rollout import path_costs
from tiltflow.samplers.sampling import Sampling, SolverName
from tiltflow.settings import External, PathOrName, Settings, validate
from tiltflow.streams import stream
from tiltflow.training.callbacks import Callback
from tiltflow.training.determinism import deterministic
from tiltflow.training.optimizer import Optimizer, fill_optimizer
from tiltflow.training.settings import Training
from tiltflow.training.trainer import trainable_copy
from tiltflow.user_code import refused, tried

PATHS = 32
"""Pictures of the path KL, at least."""
LEAST_STD = 1e-4
"""Added to the standard deviation that a reward is divided by."""
NO_PULL = 1e30
"""The standard deviation of a prompt for whose pictures the reward is hardly ever finite: they count as all alike."""

Count = Annotated[int, Field(ge=1)]
RewardSettings = Annotated[Any, BeforeValidator(part_of("rewards"))]


class Adapter(Settings):
    """A LoRA in the denoiser, by peft."""

    rank: Count = 16
    """Of the LoRA's matrices."""
    lora_alpha: Count | None = None
    """The adapter's output is scaled by lora_alpha / rank; by default `rank`."""
    target_modules: tuple[str, ...] | None = None
    """The ends of the names of the layers; by default the attention of the family."""


class Lora(Settings):
    """A LoRA that the model has before it is tuned."""

    path: PathOrName
    """A file, a folder, or a name on the hub, as `pipeline.load_lora_weights` reads it, in safetensors."""
    strength: float = 1.0
    """What its output is multiplied with."""


class DiffusersModel(Settings):
    """A pipeline of diffusers."""

    diffusers: PathOrName
    """A folder, or a name: in tiltflow, `tiles-pipeline`, or on the hub."""
    revision: str | None = None
    """Of a model on the hub: a branch, a tag or a commit."""
    variant: str | None = None
    """Of its files, such as fp16."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """dtype of the frozen weights; the adapter, the decoder and the mathematics are in float32."""
    height: Count | None = None
    """Of the pictures, in pixels; the pipeline's own by default."""
    width: Count | None = None
    """Of the pictures, in pixels; the pipeline's own by default."""
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """By default 7.5, or 3.5 where it is an input of the network."""
    negative_prompt: str | None = None
    """What guidance leads away from; nothing, or the empty prompt, by default, as the pipeline has it."""
    max_sequence_length: Count | None = None
    """Tokens of a prompt that T5 sees, where there is one; by default the pipeline's own number."""
    without: tuple[str, ...] = ()
    """Parts of the pipeline that are not loaded: text_encoder_3, the T5 of Stable Diffusion 3, which it can do without."""
    loras: tuple[Lora, ...] = ()
    """LoRAs that are loaded first, and stay below the adapter, in base and tuned alike."""
    adapter: Adapter | None = Adapter()
    """null tunes the whole denoiser, beside a frozen copy."""
    scheduler: dict[str, Any] = Field(default_factory=dict)
    """Settings of the pipeline's scheduler to change, such as `timestep_spacing: trailing`."""
    gradient_checkpointing: bool = False
    """Compute activations once more on the way back: less memory, a third more time."""

    def load(self, device: str) -> TextToImage:
        """The untuned model. Raises InputError if it cannot be had."""
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        options |= {key: value for key in ("revision", "variant") if (value := getattr(self, key)) is not None}
        options |= dict.fromkeys(self.without)
        pipeline = load_pipeline(self.diffusers, options)
        for part in self.without:
            if part not in pipeline.components:
                raise InputError(
                    f"model.without: {type(pipeline).__name__} has no {part!r}{did_you_mean(part, pipeline.components)}"
                )
        load_loras(pipeline, self.loras)
        own = pipeline.scheduler.config
        for key in self.scheduler:
            if key not in own:
                raise InputError(f"model.scheduler: {type(pipeline.scheduler).__name__} has no {key!r}{did_you_mean(key, own)}")
        check_numbers(self.scheduler, "model.scheduler")
        with refused("model.scheduler: is refused"):
            pipeline.scheduler = type(pipeline.scheduler).from_config(own, **self.scheduler)
        given = ("height", "width", "guidance_scale", "negative_prompt", "max_sequence_length")
        model = from_diffusers(pipeline, device=device, **{key: getattr(self, key) for key in given})
        if self.gradient_checkpointing:
            cast(Any, model.denoiser.network).enable_gradient_checkpointing()
        return model


def load_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Load LoRAs into a pipeline, and switch them on. Raises InputError for what cannot be had, or is of another model."""
    if not loras:
        return
    names = [f"lora_{i}" for i in range(len(loras))]
    for i, (name, lora) in enumerate(zip(names, loras, strict=True)):
        with refused(f"model.loras.{i}.path {lora.path}: cannot be loaded"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # it is wanted
            pipeline.load_lora_weights(lora.path, adapter_name=name, use_safetensors=True)
    with refused("model.loras: do not fit the pipeline"):
        pipeline.set_adapters(names, [lora.strength for lora in loras])


class Point(Settings):
    """A way to sample, of which there is a row in the table."""

    solver: SolverName = "euler"
    """Any solver of `Sampling`."""
    num_inference_steps: Count = 50
    """Steps from noise to data."""
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """The model's own by default; 1 is none."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(solver=self.solver, num_inference_steps=self.num_inference_steps)


class TextToImageEvaluation(Settings):
    """What is measured after training, on held-out prompts, for the base and the tuned model from the same noise."""

    num_prompts: Count = 16
    """Held-out prompts, at most."""
    num_generations: Annotated[int, Field(ge=2)] = 4
    """Pictures of each of them."""
    batch_size: Count = 8
    """Pictures at a time. It is part of what they depend on."""
    rewards: tuple[RewardSettings, ...] = ()
    """Held-out rewards, which training has not seen."""
    features: PathOrName | None = None
    """In which features diversity is measured: a CLIP model, a folder or a name on the hub, or yours, `package.module:function`
    of images [batch, 3, height, width] in [-1, 1], such as DreamSim's. Without it, in pixels."""
    reference: Annotated[str, External(but=("base",))] | None = None
    """Pictures that FID and KID compare with, in the features: an .npz file, a folder, or `base`, fresh ones of the base."""
    points: Annotated[tuple[Point, ...], Field(min_length=1)] = (Point(),)
    """How pictures are drawn; the first one is that of the pictures and the report's numbers."""

    @model_validator(mode="after")
    def _reference_has_features(self) -> TextToImageEvaluation:
        if self.reference is not None and self.features is None:
            raise ValueError("reference needs features, in which pictures are compared with it")
        return self


class TextToImageRecipe(Settings):
    """A training run of a pipeline, complete."""

    description: str = ""
    """A line for people: it is shown when the run begins, and in its report."""
    model: DiffusersModel
    """The pipeline."""
    prompts: Prompts
    """What it is asked for."""
    reward: RewardSettings
    """What is tuned toward: `tiltflow settings` lists the rewards."""
    method: Annotated[Any, BeforeValidator(part_of("methods"))]
    """How it is tuned: `tiltflow settings` lists the methods."""
    optimizer: Optimizer = Optimizer()
    """AdamW and its schedule."""
    training: Training = Training()
    """The loop."""
    evaluation: TextToImageEvaluation = TextToImageEvaluation()
    """What is measured after training."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed, recipe, software and machine give the same result, bit for bit."""

    @model_validator(mode="after")
    def _teaches(self) -> TextToImageRecipe:
        object.__setattr__(self, "training", self.training.for_prompts())
        object.__setattr__(self, "optimizer", fill_optimizer(self.method, self.optimizer))
        assert self.training.num_generations is not None
        if why := self.method.learns_nothing(self.training.num_generations):
            raise ValueError(f"training.num_generations {self.training.num_generations} teaches nothing: {why}; give 2 or more")
        return self


def tuned_copy(model: TextToImage, adapter: Adapter | None, seed: int, trainable: str | re.Pattern[str] = "") -> TextToImage:
    """What is going to be trained: the model with a new adapter, or a copy of its denoiser beside it.

    Args:
        trainable: of a copy, the parameters in whose name this regular expression is found; the others stay as they are.

    Raises InputError for a copy of a denoiser with a LoRA in it, which plain diffusers could not load again, and for a pattern
    beside an adapter, which is trained alone.
    """
    if adapter is None:
        if loaded := getattr(model.denoiser.network, "peft_config", {}):
            raise InputError(
                f"adapter null tunes the whole {model.family.DENOISER}, and it has a LoRA loaded ({', '.join(loaded)}): call"
                " pipeline.fuse_lora() and pipeline.unload_lora_weights() first"
            )
        copy = trainable_copy(cast(Flow, model.flow), trainable)
        cast(Any, copy.network).float()  # whatever the dtype of the frozen one: small updates vanish in 16 bits
        return replace(model, flow=copy)
    if re.compile(trainable).pattern:
        raise InputError("training.trainable: with an adapter the adapter alone is trained; leave it out, or set adapter null")
    options = {key: value for key, value in adapter.model_dump().items() if value is not None}
    return with_adapter(model, **options, seed=seed)


@dataclass(frozen=True)
class Measures:
    """What pictures are measured by: the reward and the held-out ones, by name, and features in which they are compared."""

    rewards: dict[str, Reward]
    extract: Features | None

    @classmethod
    def build(cls, recipe: TextToImageRecipe, device: str) -> Measures:
        """Raises InputError for what cannot be had."""
        every = (recipe.reward, *recipe.evaluation.rewards)
        names = labels([part.name for part in every])
        rewards = [build_reward(recipe.reward, recipe.method, device), *(part.build(device) for part in every[1:])]
        features = recipe.evaluation.features
        extract = None if features is None else feature_extractor(features, device)
        return cls(dict(zip(names, rewards, strict=True)), extract)


def prepare_recipe(recipe: TextToImageRecipe, device: str) -> tuple[Prepared[TextToImage], Measures]:
    """Load what the recipe names. Raises InputError for what cannot be had or does not fit."""
    prompts, _ = read_prompts(recipe.prompts, recipe.seed)
    model = recipe.model.load(device)
    if getattr(recipe.reward, "learned", False):
        raise InputError(f"reward {recipe.reward.name!r} learns from samples, which it cannot from those of a pipeline")
    measures = Measures.build(recipe, device)
    reward = measures.rewards[recipe.reward.name]
    rehearse(recipe, model, measures, prompts[0], device)
    check_fit(model, prompts, recipe.method, recipe.training)
    tuned = tuned_copy(model, recipe.model.adapter, recipe.seed, recipe.training.trainable)
    normalized = normalizer(recipe.training, recipe.method.sampling, reward, recipe.seed)
    parts = prepare(
        model, tuned, prompts, reward, recipe.method, recipe.training, recipe.optimizer, normalized=normalized, seed=recipe.seed
    )
    return parts, measures


def normalizer(training: Training, sampling: Sampling, reward: Reward, seed: int) -> Callable[[TextToImage], Reward] | None:
    """What makes of the untuned model the reward that `per_prompt_normalization` asks for; None if it is not asked for."""
    if training.per_prompt_normalization is None:
        return None
    return lambda untuned: PerPrompt(reward, BaseStatistics(training, sampling, untuned, reward, seed))


def run_text_to_image(
    recipe: TextToImageRecipe,
    folder: Path,
    *,
    device: str = "cpu",
    callbacks: Sequence[Callback] = (),
    note: Callable[[str], None] = lambda text: None,
    handle_signals: bool = False,
) -> dict[str, Any]:
    """Train by `recipe` into `folder`, and evaluate, as `tiltflow.runs.run.run` does. Returns the summary."""
    with deterministic(recipe.training.deterministic), RunFolder.begin(folder, recipe, note) as place:
        recipe = place.recipe
        (parts, measures), began = prepare_recipe(recipe, device), time.perf_counter()
        trained = sum(parameter.nbytes for parameter in parts.flow.parameters())
        place.check_room(trained, model=trained)

        save = partial(place.save, parts.tuned.denoiser, partial(save_tuned, parts.tuned))
        watcher = None
        if recipe.training.monitor is not None:
            watcher = make_watcher(recipe, parts, measures, partial(save, to="best"), device)

        place.train(parts.loop, save, callbacks=callbacks, watcher=watcher, handle_signals=handle_signals)
        seconds = time.perf_counter() - began
        summary = evaluate_text_to_image(
            recipe, folder, parts.untuned, parts.tuned, device=device, measures=measures, seconds=seconds
        )
        place.end(summary)
        return summary


@torch.no_grad()
def make_watcher(
    recipe: TextToImageRecipe, parts: Prepared[TextToImage], measures: Measures, save_best: Callable[[], None], device: str
) -> Watcher:
    """How the recipe's monitor looks at the model: on the evaluation's held-out prompts, by the reward, by the held-out ones,
    and by how much the pictures of a prompt differ."""
    settings = recipe.evaluation
    prompts = evaluation_prompts(recipe)
    point, count = settings.points[0], settings.num_generations

    def look(step: int, model: TextToImage = parts.tuned) -> Look:
        images = model.sample(
            [prompt.text for prompt in prompts],
            seed=stream(recipe.seed, "monitor").initial_seed(),
            sampling=point.sampling,
            guidance_scale=point.guidance_scale,
            batch_size=settings.batch_size,
        )
        found = {
            key: scores(each, images, prompts, settings.batch_size, device, recipe.training.non_finite_rewards)
            for key, each in measures.rewards.items()
        }
        own = found.pop(recipe.reward.name)
        features = compared(images, measures.extract, settings.batch_size, device)
        variety = torch.cat([spread(part) for part in features.split(count)])
        return look_at(step, {"reward": own, **found, VARIETY: variety}, count)

    first = look(0, parts.untuned)
    return Watcher(
        first=first,
        look=look,
        save_best=save_best,
        best_by=next(iter(first.held_out)),
    )


def evaluation_prompts(recipe: TextToImageRecipe) -> list[Prompt]:
    """The held-out prompts, each as often as it has pictures."""
    _, held_out = read_prompts(recipe.prompts, recipe.seed)
    settings = recipe.evaluation
    return [prompt for prompt in held_out[: settings.num_prompts] for _ in range(settings.num_generations)]


def compared(images: Tensor, extract: Features | None, batch_size: int, device: str) -> Tensor:
    """What of pictures is compared: their features, or, without any, their pixels."""
    return images.clamp(-1, 1) if extract is None else features_of(images, extract, batch_size, device)


ROUGH = 4
"""Steps, at most, in which pictures are drawn to try what looks at them; some schedulers take no fewer."""


def rough_pictures(model: TextToImage, prompt: Prompt, sampling: Sampling | None = None, scale: float | None = None) -> Tensor:
    """Two pictures [2, 3, height, width] of a prompt, drawn in few steps: to try what looks at pictures."""
    asked = sampling or Sampling(solver="euler", num_inference_steps=ROUGH)
    few = asked.model_copy(update={"num_inference_steps": min(ROUGH, asked.num_inference_steps)})
    return model.sample([prompt.text, prompt.text], sampling=few, guidance_scale=scale)


def check_reward(reward: Reward, method: Any, pictures: Tensor, prompt: Prompt) -> None:
    """Raises InputError, of one line, if a reward does not take these two pictures of a prompt, or has no gradient where the
    method needs one. It need not be finite for rough pictures."""
    gradient = getattr(method, "needs_reward_gradient", False)
    try_reward(told(reward, [prompt, prompt]), pictures, gradient=gradient, non_finite="drop")


def rehearse(recipe: TextToImageRecipe, model: TextToImage, measures: Measures, prompt: Prompt, device: str) -> None:
    """Try on two pictures of each way to sample, drawn in few steps, all that the training and the evaluation will need of
    others. Raises InputError, of one line, for what does not work: now, and not after the training.

    Rewards need not be finite for such pictures: a detector may see nothing in them.
    """
    settings, pictures = recipe.evaluation, torch.zeros(0)
    with tried("method"):
        recipe.method.sampling.times(model.grid)
    for i, point in reversed(list(enumerate(settings.points))):
        with tried(f"evaluation.points[{i}]"):
            point.sampling.times(model.own_grid)
            pictures = rough_pictures(model, prompt, point.sampling, point.guidance_scale)
    for name, reward in measures.rewards.items():
        if name == recipe.reward.name:
            check_reward(reward, recipe.method, pictures.to(device), prompt)
        else:
            with tried(f"evaluation.rewards {name}"):
                check_reward(reward, None, pictures.to(device), prompt)
    if measures.extract is None:
        return
    with tried():
        found = features_of(pictures, measures.extract, settings.batch_size, device)
        if settings.reference is not None:
            real = pictures if settings.reference == "base" else reference_images(settings.reference)[:2]
            distances_to_reference(found, features_of(real, measures.extract, settings.batch_size, device))


def read_run(folder: Path) -> TextToImageRecipe:
    """The recipe of a run. Raises InputError if `folder` is no run of a pipeline."""
    tree = read_run_tree(folder)
    if not is_text_to_image(tree):
        raise InputError(f"{folder}: is no run of a diffusers pipeline; `tiltflow.load` reads its model")
    return validate(TextToImageRecipe, tree, str(folder / "recipe.yaml"))


def load_run(recipe: TextToImageRecipe, folder: Path, device: str = "cpu") -> tuple[TextToImage, TextToImage]:
    """(base, tuned) of a finished run; with an adapter they share their network, so `base_of` gives the base.

    Raises InputError if the base is not the one that was tuned, and that is not accepted.
    """
    check_unchanged(folder, recipe, only="model.")
    model = recipe.model.load(device)
    tuned = tuned_copy(model, recipe.model.adapter, recipe.seed)
    load_tuned(tuned, folder / "model")
    return model, tuned


def load_text_to_image(run: str | Path, device: str = "cpu") -> TextToImage:
    """The tuned model of a run of a pipeline, to sample from: `load_text_to_image("runs/ir").sample(["a red cat"])`. It is
    sampled, where nothing else is asked for, as the evaluation's first point says.

    Raises InputError if it is no such run or its base cannot be had.
    """
    recipe = read_run(Path(run))
    _, tuned = load_run(recipe, Path(run), device)
    point = recipe.evaluation.points[0]
    scale = tuned.guidance_scale if point.guidance_scale is None else point.guidance_scale
    return replace(tuned, sampling=point.sampling, guidance_scale=scale)


@torch.no_grad()
def evaluate_text_to_image(
    recipe: TextToImageRecipe,
    folder: Path,
    model: TextToImage,
    tuned: TextToImage,
    *,
    device: str = "cpu",
    measures: Measures | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure a run on held-out prompts; writes summary.json, the pictures and report.html."""
    settings, method = recipe.evaluation, recipe.method
    told = evaluation_prompts(recipe)
    prompts = [prompt.text for prompt in told]
    texts = prompts[:: settings.num_generations]
    measures = measures or Measures.build(recipe, device)
    extract = measures.extract
    base = tuned.base() if recipe.model.adapter else model
    rows_of_metrics = read_records(folder)
    began = time.perf_counter()

    reference = reference_features(settings, base, prompts, extract, recipe.seed, device)
    table: list[dict[str, Any]] = []
    pictures: dict[str, Tensor] = {}
    rewards: dict[str, dict[str, Tensor]] = {}
    for i, point in enumerate(settings.points):
        scale = None
        for name, one in (("base", base), ("tuned", tuned)):
            images = one.sample(
                prompts,
                seed=recipe.seed,
                sampling=point.sampling,
                guidance_scale=point.guidance_scale,
                batch_size=settings.batch_size,
            )
            values = {
                key: scores(reward, images, told, settings.batch_size, device, recipe.training.non_finite_rewards)
                for key, reward in measures.rewards.items()
            }
            row: dict[str, Any] = {
                "model": name,
                **point.model_dump(),
                "guidance_scale": model.guidance_scale if point.guidance_scale is None else point.guidance_scale,
            }
            for key, value in values.items():
                row |= over_groups(value, settings.num_generations).named(key)
            found = compared(images, extract, settings.batch_size, device)
            if scale is None:  # of the base, which comes first
                scale = squared_distance(found, settings.num_generations)
            row |= diversity(found, settings.num_generations, scale if extract is None else None)
            if reference is not None:
                row |= distances_to_reference(found, reference, recipe.seed)
            table.append(row)
            if i == 0:
                pictures[name], rewards[name] = images, values

    taken = rows_of_metrics[-1]["step"]
    tilted = rewards["base"][recipe.reward.name]
    if recipe.training.per_prompt_normalization:
        reward = measures.rewards[recipe.reward.name]
        statistics = BaseStatistics(recipe.training, method.sampling, base, reward, recipe.seed)
        mean, std = statistics(prompts, [prompt.metadata for prompt in told])
        tilted = (tilted - mean) / std
    own = recipe.reward.name
    in_base, in_tuned, groups = kept_of_groups(rewards, settings.num_generations)
    left_out = {name: int(values[own].isnan().sum()) for name, values in rewards.items()}
    of_base, of_tuned = (
        {key: each[which] for key, each in rewards[name].items()} for name, which in (("base", in_base), ("tuned", in_tuned))
    )
    weights = ImportanceWeights.from_log_tilt(method.log_tilt(tilted[in_base], taken), groups)
    calibrated = calibration_in_words(getattr(method, "beta", None), rows_of_metrics[-1].get("beta"))
    # a gain at its limit has not made the mean reward what it should be
    counted, generator = calibrated["calibration_at_limit"] is not False, stream(recipe.seed, "bootstrap")
    of_reward, tests = of_rewards(of_tuned[own], of_base[own], weights, generator, counted=counted, group="prompt")
    if of_reward["target_unknown"] is None:
        others = [name for name in measures.rewards if name != own]
        tests += [mean_test(f"mean {name}", of_tuned[name], of_base[name], weights) for name in others]
    summary: dict[str, Any] = {
        "tiltflow": __version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "name": final_name(folder),
        "description": recipe.description,
        "model": recipe.model.diffusers,
        "method": method.name,
        "beta": getattr(method, "beta", None),
        "working_beta": rows_of_metrics[-1].get("beta"),
        "calibration_at_limit": calibrated["calibration_at_limit"],
        "target_law": method.target_law(taken)
        + (", r in standard deviations of the base's for its prompt" if recipe.training.per_prompt_normalization else ""),
        "limits": [
            *method.limits(model.grid),
            *calibrated["limits"],
            *guidance_limits(recipe.training.guidance_mode),
            *left_out_in_words(left_out["base"], left_out["tuned"], len(prompts)),
        ],
        "reward": recipe.reward.name,
        "reward_description": recipe.reward.description,
        "iterations": taken,
        "max_train_steps": recipe.training.max_train_steps,
        "seed": recipe.seed,
        "num_samples": len(prompts),
        "num_prompts": len(texts),
        **over_groups(rewards["base"][own], settings.num_generations).named("reward_base"),
        **over_groups(rewards["tuned"][own], settings.num_generations).named("reward_tuned"),
        **over_groups(rewards["tuned"][own] - rewards["base"][own], settings.num_generations).named("reward_gain"),
        **of_reward,
        "judge": None,
        **of_paths(recipe, tuned, base, texts),
        "diversity_in": "pixels" if extract is None else f"features of {settings.features}",
        "table": table,
        **of_monitor(folder),
        "seconds": rows_of_metrics[-1]["seconds"],
        "network_evaluations": rows_of_metrics[-1]["network_evaluations"],
        "samples_drawn": rows_of_metrics[-1].get("samples_drawn"),
    }
    if not model.distilled and (settings.points[0].guidance_scale or model.guidance_scale) != 1:
        # of the law of guided pictures: not to be held against paths without guidance
        summary |= dict.fromkeys(("path_kl_target", "path_kl_target_error"))
    summary |= conclude(tests, summary)
    summary["seconds_total"] = (seconds or rows_of_metrics[-1]["seconds"]) + time.perf_counter() - began
    columns = settings.num_generations if len(texts) > 1 else 8
    rows = math.ceil(min(len(prompts), 64) / columns)
    summary["pictures"] = {"rows": rows, "prompts": texts[:rows]}
    if not processes.is_main():
        return summary
    for name, images in (("before", pictures["base"]), ("after", pictures["tuned"])):
        write_file(folder / f"{name}.png", partial(image_grid(images[:64], columns).save, format="png"))
    write_text(folder / "prompts.txt", "\n".join(texts) + "\n")
    write_json(folder / "summary.json", summary)
    write_report(folder)
    return summary


def kept_of_groups(rewards: Mapping[str, Mapping[str, Tensor]], size: int) -> tuple[Tensor, Tensor, int]:
    """Which pictures stand for the laws where rewards are NaN: (indices in the base, in the tuned model, of how many prompts).

    Of each prompt equally many, the first of those with finite rewards, which are as good a sample as any others; as many as
    keeps the most pictures in all. Prompts that have fewer are left out.

    Args:
        rewards: of `base` and `tuned`, by name, [prompts * size] each.

    Raises NonFiniteError if no prompt has two in both.
    """
    finite = [torch.stack([each.isfinite() for each in rewards[name].values()]).all(0) for name in ("base", "tuned")]
    fewest = torch.stack([each.reshape(-1, size).sum(1) for each in finite]).amin(0)
    kept = {count: int((fewest >= count).sum()) for count in range(2, size + 1)}
    best = max(kept, key=lambda count: (count * kept[count], count))
    if not kept[best]:
        raise NonFiniteError("the rewards are finite for at most one picture of each prompt")
    chosen = (fewest >= best).nonzero()[:, 0].tolist()
    of_base, of_tuned = (
        torch.cat([i * size + each.reshape(-1, size)[i].nonzero()[:best, 0] for i in chosen]) for each in finite
    )
    return of_base, of_tuned, len(chosen)


def labels(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again.

    >>> labels(["clip-score", "hps", "clip-score"])
    ['clip-score', 'hps', 'clip-score 2']
    """
    counts = [list(names[: i + 1]).count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name} {count}" for name, count in zip(names, counts, strict=True)]


def scores(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[Prompt],
    batch_size: int,
    device: str,
    non_finite: NonFiniteRewards = "error",
) -> Tensor:
    """[len(prompts)] on the CPU, float64; with `drop`, NaN where a reward is not finite."""
    parts = []
    for i in range(0, len(prompts), batch_size):
        part = images[i : i + batch_size].to(device)
        parts.append(evaluate(shared(told(reward, prompts[i : i + batch_size])), part, non_finite).double().cpu())
    return torch.cat(parts)


def squared_distance(pictures: Tensor, num_generations: int) -> float:
    """Mean squared distance between two pictures of one prompt: twice the variance of [n, ...], `num_generations` of each."""
    groups = pictures.flatten(1).double().reshape(-1, num_generations, pictures[0].numel())
    return 2 * float(groups.var(1).sum(1).mean())


def diversity(pictures: Tensor, num_generations: int, scale: float | None = None) -> dict[str, float]:
    """How much pictures of one prompt differ, with its standard error over prompts: the sum of the variances of their features,
    and the Vendi score (2210.02410), the effective number of different pictures among `num_generations`.

    Args:
        pictures: features [n, width] or images [n, ...], those of a prompt side by side.
        scale: for images, whose similarity is exp(-d^2 / scale), d their distance. One scale for all that is compared, so that
            the score falls to 1 as pictures become one, whichever that is. None for features, whose directions say how alike
            two are.
    """
    x = pictures.flatten(1).double()
    groups = x.reshape(-1, num_generations, x.shape[1])
    variance = groups.var(1).sum(1)
    if scale is None:
        directions = torch.nn.functional.normalize(groups, dim=2)
        kernels = directions @ directions.mT
    else:
        kernels = torch.exp(-torch.cdist(groups, groups).square() / max(scale, 1e-12))
    vendi = torch.stack([effective_number(kernel) for kernel in kernels])
    return _estimate(variance).named("variance") | _estimate(vendi).named("vendi")


def _estimate(values: Tensor) -> Estimate:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(values.mean().item(), error)


def reference_features(
    settings: TextToImageEvaluation,
    base: TextToImage,
    prompts: Sequence[str],
    extract: Features | None,
    seed: int,
    device: str,
) -> Tensor | None:
    """[n, width] of the pictures that FID and KID compare with, if there are any. Those of the base are from other noise than
    the pictures in the table, so the base's own distance is what is left where nothing differs."""
    if settings.reference is None or extract is None:
        return None
    if settings.reference == "base":
        point = settings.points[0]
        images = base.sample(
            prompts,
            seed=stream(seed, "reference").initial_seed(),
            sampling=point.sampling,
            guidance_scale=point.guidance_scale,
            batch_size=settings.batch_size,
        )
    else:
        images = reference_images(settings.reference)
    return features_of(images, extract, settings.batch_size, device)


def reference_images(path: str) -> Tensor:
    """Up to 10,000 pictures [n, 3, height, width]. Raises InputError if they cannot be read."""
    images = load_images(path, "test").images[:10_000]
    return images.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class BaseStatistics:
    """The mean and the standard deviation of the base's rewards for prompts, of these metadata; each prompt is sampled once, as
    in training."""

    training: Training
    sampling: Sampling
    base: TextToImage
    reward: Reward
    seed: int
    known: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> tuple[Tensor, Tensor]:
        """(means, standard deviations), both [len(prompts)] in float64."""
        several = [Prompt(text, dict(more)) for text, more in zip(prompts, metadata or [{}] * len(prompts), strict=True)]
        keys = [json.dumps([prompt.text, key_of(prompt.metadata)]) for prompt in several]
        for key, prompt in dict(zip(keys, several, strict=True)).items():
            if key not in self.known:
                self.known[key] = self.measured(prompt)
        mean, std = zip(*(self.known[key] for key in keys), strict=True)
        return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)

    @torch.no_grad()
    def measured(self, prompt: Prompt) -> tuple[float, float]:
        """(mean, standard deviation) of one prompt."""
        training = self.training
        count, size = training.per_prompt_normalization, training.micro_batch_size or training.samples_per_step
        assert count is not None
        images = self.base.sample(
            [prompt.text] * count,
            seed=stream(self.seed, "baseline", prompt.text).initial_seed(),
            sampling=self.sampling,
            guidance_scale=1 if training.guidance_mode == "none" else None,
            batch_size=size,
        )
        values = scores(self.reward, images, [prompt] * count, size, str(self.base.device), training.non_finite_rewards)
        values = values[values.isfinite()]
        if len(values) < 2:
            return 0.0, NO_PULL
        # a prompt whose rewards are all alike has nothing to tell: it must not divide by zero
        return values.mean().item(), values.std().item() + LEAST_STD

    def state_dict(self) -> dict[str, Any]:
        """See `tiltflow.rewards.Statistics`."""
        return {key: list(both) for key, both in self.known.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.known.clear()
        self.known.update({key: (mean, std) for key, (mean, std) in state.items()})


def of_paths(recipe: TextToImageRecipe, tuned: TextToImage, base: TextToImage, texts: Sequence[str]) -> dict[str, Any]:
    """`path_kl` of the summary, as in `tiltflow.runs.run.path_kl`, of a few pictures of as many of the prompts as possible."""
    size, chain = recipe.evaluation.batch_size, recipe.method.sampling
    if isinstance(recipe.method, Tilting) and not chain.has_noise:
        return dict.fromkeys(("path_kl", "path_kl_error")) | {"path_kl_absent": chain.limits(tuned.grid)[0]}
    each = max(2, PATHS // len(texts)) if len(texts) < PATHS else 1
    prompts = [text for text in texts[:PATHS] for _ in range(each)]
    return {**path_kl(tuned, base, prompts, recipe.seed, size, each).named("path_kl"), "path_kl_absent": None}


def path_kl(
    tuned: TextToImage, base: TextToImage, prompts: Sequence[str], seed: int, batch_size: int, each: int = 1
) -> Estimate:
    """KL of the trajectories of the tuned memoryless sampler from those of the base, without guidance, in nats per picture; its
    standard error over prompts, which come `each` times one after the other."""
    sampler = Sampling(num_inference_steps=tuned.sampling.num_inference_steps).chain(tuned.grid)
    parts = []
    for i in range(0, len(prompts), batch_size):
        some = prompts[i : i + batch_size]
        generator = stream(seed, "path kl", i, device=tuned.device)
        condition, _ = tuned.encode(some)
        ours, theirs = (in_chunks(one.flow.bind(condition)) for one in (tuned, base))
        parts.append(path_costs(sampler, ours, theirs, tuned.start(len(some), generator, sampler.times[0]), generator))
    return over_groups(torch.cat(parts), each)


def guidance_limits(mode: GuidanceMode | None) -> list[str]:
    """Why the law is not p_base exp(r / beta) for this guidance: one sentence for each reason."""
    match mode:
        case "rollout":
            return ["Pictures were drawn with guidance and learned from without it: no law is known that this aims at."]
        case "full":
            return ["The base of the law is the guided one, whose sampler only approximates a law."]
        case _:
            return []
