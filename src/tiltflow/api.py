"""Load, tune, train, evaluate: what works alike for image models (`Model`) and for pipelines of diffusers (`TextToImage`).

This is the one place that tells them apart; what it calls is of one kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast, overload

from pydantic import BeforeValidator, Field
from torch import nn

from tiltflow.conditions.prompts import from_rows, unique
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models import model as pixels
from tiltflow.models.consistency import WRONG_CLOCK, consistency
from tiltflow.models.model import Model
from tiltflow.models.text_to_image import AdaptedDenoiser, TextToImage, from_diffusers, save_tuned
from tiltflow.plugins import part_of
from tiltflow.reports.report import write_report
from tiltflow.rewards import LearnedReward, Reward, from_function
from tiltflow.runs.fingerprints import check_unchanged, of_network
from tiltflow.runs.lock import working_in
from tiltflow.runs.prepare import check_fit, items_of, prepare, to_train
from tiltflow.runs.recipe import is_text_to_image
from tiltflow.runs.run import REWARD, Evaluation, Recipe, evaluate_run
from tiltflow.runs.run import make_watcher as watch_pixels
from tiltflow.runs.run import run as run_pixels
from tiltflow.runs.run_folder import RECIPE, RunFolder, Watcher, read_records, read_run_tree
from tiltflow.runs.run_text_to_image import (
    Adapter,
    TextToImageRecipe,
    check_reward,
    evaluate_text_to_image,
    load_run,
    load_text_to_image,
    normalizer,
    rough_pictures,
    run_text_to_image,
    tuned_copy,
)
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings, read_yaml, validate
from tiltflow.shipped import INDEX, assets, by_name
from tiltflow.training.callbacks import Callback, asks_to_stop
from tiltflow.training.determinism import deterministic
from tiltflow.training.method import Method
from tiltflow.training.optimizer import Optimizer, check_optimizer
from tiltflow.training.settings import Training, refuse_what_needs_a_folder
from tiltflow.training.trainer import Record
from tiltflow.user_code import check_device, whole_number

AnyRecipe = Recipe | TextToImageRecipe


def read_recipe(tree: Mapping[str, Any], where: str) -> AnyRecipe:
    """A training recipe from its settings. Raises InputError, naming `where`, for the first thing that is wrong."""
    if "begun_by" in tree:
        raise InputError(f"{where}: {tree['begun_by']} began this run, in a program that has its model and reward; go on there")
    return validate(TextToImageRecipe, tree, where) if is_text_to_image(tree) else validate(Recipe, tree, where)


def run(recipe: AnyRecipe, folder: Path, **options: Any) -> dict[str, Any]:
    """Train by `recipe` into `folder`, and evaluate; see `tiltflow.runs.run.run` for the options. Returns the summary."""
    if isinstance(recipe, TextToImageRecipe):
        return run_text_to_image(recipe, folder, **options)
    return run_pixels(recipe, folder, **options)


def report(folder: str | Path) -> Path:
    """Write report.html of a run again, from the files of its folder, and return its path.

    Raises InputError if there is no summary yet, or it cannot be read.
    """
    return write_report(Path(folder))


def evaluate(folder: str | Path, *, device: str = "cpu", num_samples: int | None = None) -> dict[str, Any]:
    """Measure a run again, from its folder alone; writes its summary, pictures and report anew.

    Raises InputError if `folder` is no run, cannot be written to or is being trained, and for `num_samples` of a pipeline.
    """
    folder = Path(folder)
    recipe = read_recipe(read_run_tree(folder), str(folder / RECIPE))
    if isinstance(recipe, TextToImageRecipe) and num_samples is not None:
        raise InputError("num_samples: a run of a pipeline has evaluation.num_prompts and num_generations instead")
    with working_in(folder):
        check_unchanged(folder, recipe)
        if isinstance(recipe, Recipe):
            return evaluate_run(folder, device=device, num_samples=num_samples)
        return evaluate_text_to_image(recipe, folder, *load_run(recipe, folder, device), device=device)


def load(name_or_path: str | Path, device: str = "cpu") -> Model | TextToImage:
    """A model that can be sampled and tuned: one that ships with tiltflow, by its name, or what lies in a folder: a model, the
    tuned model of a run, or a pipeline of diffusers.

    >>> load("digits-flow").event_shape
    (1, 28, 28)

    A str without a separator is a name first, so `./digits-flow` is the folder; a Path is always a folder. `from_diffusers`
    takes a pipeline from the hub too, and has its options.

    Raises InputError if there is none, if it is a classifier, or if its files cannot be read.
    """
    given: Any = name_or_path
    if not isinstance(given, (str, Path)):
        raise InputError(f"load: give the name of a model or its folder, not {given!r}")
    check_device(device)
    shipped = by_name(name_or_path, assets(INDEX) | assets(pixels.CONFIG), "model")
    folder = shipped or Path(name_or_path)
    if (folder / INDEX).exists():
        return from_diffusers(folder, device=device)
    if is_run_of_pipeline(folder):
        return load_text_to_image(folder, device)
    return pixels.load(shipped or name_or_path, device)


NEW_ADAPTER = Adapter()


@overload
def tune(
    model: Model,
    reward: Callable[..., Any],
    method: Any,
    training: Training | None = None,
    *,
    optimizer: Optimizer | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = ...,
    note: Callable[[str], None] = ...,
) -> Model: ...


@overload
def tune(
    model: TextToImage,
    reward: Callable[..., Any],
    method: Any,
    training: Training | None = None,
    *,
    optimizer: Optimizer | None = None,
    prompts: Sequence[str | Mapping[str, Any]],
    adapter: Adapter | None = ...,
    output: str | Path | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = ...,
    note: Callable[[str], None] = ...,
) -> TextToImage: ...


def tune(
    model: Model | TextToImage,
    reward: Callable[..., Any],
    method: Any,
    training: Training | None = None,
    *,
    optimizer: Optimizer | None = None,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    adapter: Adapter | None = NEW_ADAPTER,
    output: str | Path | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    note: Callable[[str], None] = lambda text: None,
) -> Model | TextToImage:
    """Fine-tune `model` toward p_base(x) exp(r(x) / beta), and return what was tuned.

    Of an image model that is a copy, `model` being the base; one with a peft adapter is its own base and is tuned in place. To
    a pipeline's own denoiser it adds a LoRA, so `model` then draws the tuned pictures too, a second call would start from
    there, and `tuned.base()` draws those of the base. Networks are in eval mode meanwhile, and in their owner's mode
    afterwards.

    Args:
        reward: x [batch, *event] -> [batch], higher is better; for a pipeline, of images [batch, 3, height, width], about
            [-1, 1], and of `prompts` and `metadata` if it has arguments called so.
        method: the settings of a method, such as `AdjointMatching(beta=0.5)`.
        training: the loop; settings that mean nothing for the model are refused.
        optimizer: AdamW and its schedule; what is left out is as the method has it by default.
        prompts: for a pipeline: texts, or mappings with the key `prompt`, whose other keys are the metadata.
        adapter: for a pipeline: the LoRA to add. By default one is added, unless the model has one of `with_adapter`, which is
            then trained. None tunes the whole denoiser beside a frozen copy.
        output: a folder, new or empty, where settings, metrics, checkpoints and, in `model/`, what was tuned are left. Settings
            of `training` that need one are refused without it.
        callbacks: functions that are called with every record, `Record`; one that returns True ends the training.
        note: is told what a person should know about where a run goes on from, and of alarms.

    Raises InputError, before the first step, for what does not fit; NonFiniteError, CollapseError and CheckpointError. After
    any of them, and after KeyboardInterrupt, `output` has what was tuned until then.
    """
    seed = whole_number(seed, "tune: seed")
    settings = check_arguments(model, reward, method, training, callbacks, note, prompts, adapter)
    optimizer = check_optimizer(method, optimizer)
    with deterministic(settings.deterministic):
        if output is None:
            tuned, loop = steps(
                model, reward, method, settings, optimizer=optimizer, prompts=prompts, adapter=adapter, seed=seed
            )
            with closing(loop) as records:
                for record in records:
                    if asks_to_stop(callbacks, record):
                        break
            return tuned
        run = PythonRun.of(model, reward, method, settings, optimizer, prompts, seed)
        folder = Path(output)
        network = model.denoiser if isinstance(model, TextToImage) else model.flow.network
        also = {"model": of_network(network)} if isinstance(network, nn.Module) else {}
        with RunFolder.begin(folder, run, note, also) as place:
            tuning = _tuning(model, from_function(reward), method, settings, optimizer, prompts, adapter, seed)

            save = partial(place.save, tuning.network, tuning.write)
            watcher = tuning.watcher(run, partial(save, to="best")) if settings.monitor is not None else None
            place.train(tuning.loop, save, callbacks=callbacks, watcher=watcher)
            place.end({"iterations": read_records(folder)[-1]["step"]})
            return tuning.tuned


def steps(
    model: Model | TextToImage,
    reward: Callable[..., Any],
    method: Any,
    training: Training | None = None,
    *,
    optimizer: Optimizer | None = None,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    adapter: Adapter | None = NEW_ADAPTER,
    seed: int = 0,
) -> tuple[Model | TextToImage, Generator[Record, None, None]]:
    """`tune`, one optimizer step at a time: what is being tuned, and the loop, which yields a `Record` for every step.

    Whenever the loop is closed, the weights are complete: as of the last step, or their moving average. Nothing is written.

    Raises InputError as `tune` does, and for settings of `training` that need a folder.
    """
    settings = check_arguments(model, reward, method, training, (), print, prompts, adapter)
    optimizer = check_optimizer(method, optimizer)
    refuse_what_needs_a_folder(settings)
    seed = whole_number(seed, "steps: seed")
    tuning = _tuning(model, from_function(reward), method, settings, optimizer, prompts, adapter, seed)

    def loop() -> Generator[Record, None, None]:
        with deterministic(settings.deterministic), closing(tuning.loop()) as records:
            yield from records

    return tuning.tuned, loop()


def check_arguments(
    model: Any, reward: Any, method: Any, training: Any, callbacks: Any, note: Any, prompts: Any, adapter: Any
) -> Training:
    """The training settings with the defaults of this kind of model. Raises InputError, of one line, for arguments of `tune` of
    another kind, with what was most likely meant."""
    if not isinstance(model, (Model, TextToImage)):
        meant = "a Model or what from_diffusers gives"
        if isinstance(model, (str, Path)):
            meant = f"tiltflow.load({str(model)!r})"
        elif isinstance(model, Flow):
            meant = "Model(flow, event_shape)"
        elif isinstance(model, nn.Module):
            meant = "Model(Flow(network), event_shape)"
        raise InputError(f"tune: model must be {meant}, is {type(model).__name__}")
    if isinstance(reward, Settings):
        raise InputError(f"tune: reward is the settings of one; give what they build: {type(reward).__name__}(..).build()")
    if isinstance(method, type) or not isinstance(method, Method):
        got = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise InputError(f"tune: method must be the settings of one, such as AdjointMatching(beta=1.0), is {got}")
    if training is not None and not isinstance(training, Training):
        raise InputError(f"tune: training must be a Training(max_train_steps=.., ..), is {training!r}")
    if not isinstance(callbacks, (list, tuple)) or not all(map(callable, callbacks)):
        raise InputError(f"tune: callbacks must be a list of functions of a record, is {callbacks!r}")
    if not callable(note):
        raise InputError(f"tune: note must be a function, is {note!r}")
    from_function(reward)
    if isinstance(model, TextToImage):
        return (training or Training()).for_prompts()
    if prompts is not None or adapter is not NEW_ADAPTER:
        raise InputError("tune: prompts and adapter are for a pipeline of diffusers, and this model is none")
    return (training or Training()).for_samples()


class PythonRun(Settings):
    """What is written down of a run that `tune` began: its settings, and the names of what only the program has."""

    begun_by: Literal["tiltflow.tune"] = "tiltflow.tune"
    description: str = ""
    model: str
    """The class of the network."""
    reward: str
    """The function, or its class."""
    prompts: tuple[str | dict[str, Any], ...] = ()
    method: Annotated[Any, BeforeValidator(part_of("methods"))]
    optimizer: Optimizer
    training: Training
    sampling: Sampling
    evaluation: Evaluation = Evaluation()
    """What its monitor looks at."""
    seed: Annotated[int, Field(ge=0)]

    @classmethod
    def of(
        cls,
        model: Model | TextToImage,
        reward: Callable[..., Any],
        method: Any,
        training: Training,
        optimizer: Optimizer,
        prompts: Sequence[str | Mapping[str, Any]] | None,
        seed: int,
    ) -> PythonRun:
        """Of the arguments of `tune`. Raises InputError for what cannot be written down."""
        network = model.denoiser.network if isinstance(model, TextToImage) else model.flow.network
        tree = {
            "model": type(network).__name__,
            "reward": getattr(reward, "__qualname__", type(reward).__qualname__),
            "prompts": tuple(prompts or ()),
            "method": method,
            "optimizer": optimizer,
            "training": training,
            "sampling": model.sampling,
            "seed": seed,
        }
        return validate(cls, tree, "tune")


@dataclass(frozen=True)
class _Tuning:
    """What a kind of model gives to `tune`.

    Args:
        network: what is trained.
        loop: takes the arguments of `train` about where to go on from and when to stop.
        write: what was tuned, into a folder.
        watcher: looks at the model for a monitor; of (the run, what keeps the best model).
    """

    tuned: Model | TextToImage
    network: Any
    loop: Callable[..., Generator[Record, None, None]]
    write: Callable[[Path], None]
    watcher: Callable[[PythonRun, Callable[[], None]], Watcher]


def _tuning(
    model: Model | TextToImage,
    reward: Reward,
    method: Any,
    training: Training,
    optimizer: Optimizer,
    prompts: Sequence[str | Mapping[str, Any]] | None,
    adapter: Adapter | None,
    seed: int,
) -> _Tuning:
    if isinstance(model, TextToImage):
        return _of_pipeline(model, reward, method, training, optimizer, prompts, adapter, seed)
    return _of_pixels(model, reward, method, training, optimizer, seed)


def _of_pixels(model: Model, reward: Reward, method: Any, training: Training, optimizer: Optimizer, seed: int) -> _Tuning:
    base, tuned = to_train(model, training)
    loop = prepare(base, tuned, items_of(base, training), reward, method, training, optimizer, seed=seed).loop
    if model.network_settings is None and consistency(model).wrong:  # of a network that tiltflow does not know
        warnings.warn(f"this network is not the velocity field of the law that it samples: {WRONG_CLOCK}", stacklevel=4)

    def write(folder: Path) -> None:
        if isinstance(reward, LearnedReward):
            pixels.save_weights(reward.network, folder.parent / REWARD)
        if tuned.network_settings is not None:
            tuned.save(folder, f"# A model tuned by {method.name}\n\nIts settings are `recipe.yaml` of the run.\n")
        else:  # tiltflow has no words for the network: its owner has
            folder.mkdir(parents=True, exist_ok=True)
            pixels.save_weights(cast(nn.Module, tuned.flow.network), folder / pixels.WEIGHTS)

    def watcher(run: PythonRun, save_best: Callable[[], None]) -> Watcher:
        return watch_pixels(cast(Recipe, run), model, tuned, reward, save_best, str(model.device))

    return _Tuning(tuned, tuned.flow.network, loop, write, watcher)


def _of_pipeline(
    model: TextToImage,
    reward: Reward,
    method: Any,
    training: Training,
    optimizer: Optimizer,
    prompts: Sequence[str | Mapping[str, Any]] | None,
    adapter: Adapter | None,
    seed: int,
) -> _Tuning:
    if not prompts:
        raise InputError("tune: a pipeline needs prompts=[..], texts that it draws pictures of")
    if training.monitor is not None:
        raise InputError(
            "training.monitor: looks at held-out prompts, which a recipe has for `tiltflow train`, and tune has not"
        )
    if isinstance(reward, LearnedReward):
        raise InputError("the reward learns from samples, which it cannot from those of a pipeline")
    texts = unique(
        from_rows([{"prompt": each} if isinstance(each, str) else dict(each) for each in prompts], "prompt", "of tune")
    )
    if not texts:
        raise InputError("tune: all prompts are blank")
    check_reward(reward, method, rough_pictures(model, texts[0]).to(model.device), texts[0])
    check_fit(model, texts, method, training)  # before the pipeline gets an adapter
    own = adapter is NEW_ADAPTER and isinstance(model.denoiser, AdaptedDenoiser)
    tuned = model if own else tuned_copy(model, adapter, seed, training.trainable)
    normalized = normalizer(training, method.sampling, reward, seed)
    parts = prepare(model, tuned, texts, reward, method, training, optimizer, normalized=normalized, seed=seed)

    def no_watcher(run: PythonRun, save_best: Callable[[], None]) -> Watcher:
        raise AssertionError("a monitor was refused")

    return _Tuning(tuned, tuned.denoiser, parts.loop, partial(save_tuned, tuned), no_watcher)


def is_run_of_pipeline(folder: Path) -> bool:
    """Whether `folder` is that of a training run of a pipeline."""
    path = folder / RECIPE
    return path.is_file() and is_text_to_image(read_yaml(path))
