"""Load, tune, steer, compare, train, evaluate, report: what Python can do, for every kind of model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiltflow.commands.terminal.progress import tune_progress
from tiltflow.conditions import Item
from tiltflow.conditions.labels import Labels, as_labels
from tiltflow.conditions.observations import Rows
from tiltflow.conditions.prompts import from_rows, unique
from tiltflow.control.objective import RunningReward
from tiltflow.errors import InputError
from tiltflow.evaluation.settings import Evaluation
from tiltflow.flows.flow import Flow
from tiltflow.models import model as networks
from tiltflow.models.consistency import WRONG_CLOCK, consistency
from tiltflow.models.denoiser import Denoiser
from tiltflow.models.from_diffusers import from_diffusers
from tiltflow.models.model import Model
from tiltflow.models.model_folder import CONFIG, WEIGHTS, save_weights
from tiltflow.models.pipeline_adapter import AdaptedDenoiser
from tiltflow.models.policy import Policy, is_policy, load_policy
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.strength import at_strength, checked_strength
from tiltflow.models.text_to_image import TextToImage, checked_scale
from tiltflow.models.trainable import Adapter
from tiltflow.pictures import IMAGE, Picture, picture_of
from tiltflow.reports.report import write_report
from tiltflow.rewards import LearnedReward
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.runs.comparison.budget import Budget
from tiltflow.runs.comparison.compare import compare as run_comparison
from tiltflow.runs.comparison.plan import Plan
from tiltflow.runs.fingerprints import of_network, of_pictures
from tiltflow.runs.lock import working_in
from tiltflow.runs.prepare import check_start, check_warm_start
from tiltflow.runs.run import Ready, evaluate_run, load_tuned, make_ready, train
from tiltflow.runs.run_files import RECIPE
from tiltflow.runs.run_folder import RunFolder
from tiltflow.runs.staged.results import evaluate_staged, is_staged, load_last, stage_of
from tiltflow.runs.strength import load_both
from tiltflow.samplers.sampling import Sampling, check_sampling
from tiltflow.settings import Settings, read_yaml, validate
from tiltflow.shipped import INDEX, asset
from tiltflow.steering import Steering
from tiltflow.steering.drawing.steered import Steered, steered
from tiltflow.training.callbacks import Callback, asks_to_stop
from tiltflow.training.determinism import deterministic
from tiltflow.training.method import Method, NamedMethod
from tiltflow.training.optimizer import Optimizer, check_optimizer
from tiltflow.training.settings import Training, refuse_what_needs_a_folder
from tiltflow.training.trainer import Record
from tiltflow.user_code import check_device, refused, whole_number

Condition = str | int | Mapping[str, Any]
"""What a sample is asked for: a prompt, or a mapping with the key `prompt`; a class, by name or number."""


def compare(
    methods: Sequence[str],
    problems: Sequence[str] = (),
    recipes: Sequence[str] = (),
    *,
    output: str | Path,
    seeds: int = 5,
    network_evaluations: float | None = None,
    reward_evaluations: float | None = None,
    seconds: float | None = None,
    tune: Literal["learning-rate", "none"] = "learning-rate",
    beta: float | None = None,
    num_samples: int = 4000,
    settings: Sequence[str] = (),
    processes: int = 1,
    device: str = "cpu",
    watch: Callable[[str, str, float], None] = lambda title, what, part: None,
) -> dict[str, Any]:
    """Train methods, by name, on problems of `tiltflow verify` and on recipes with the same seeds under one budget, and compare
    what they reach: rows.jsonl, comparison.json and report.html in the folder `output`. The same call again resumes. Returns
    the content of comparison.json.

    Args:
        network_evaluations, reward_evaluations, seconds: the budget of each training; exactly one.
        tune: whether each learning rate is tuned first, by the same rule.
        beta: temperature of the target law; 1 for problems and that of its own method for a recipe by default.
        num_samples: of each measurement on a problem.
        settings: overrides `NAME.key=value` of a method, problem or recipe.
        watch: is told the title of each training, how it ended, and its length in whole trainings.

    Raises InputError, before the first training, for what cannot be compared, and for a folder that holds something else.
    """
    budget = Budget.of(network_evaluations, reward_evaluations, seconds)
    chosen: dict[str, Any] = {"tune": tune, "beta": beta, "num_samples": num_samples, "settings": settings}
    plan = Plan.of(methods, problems, recipes, seeds=seeds, budget=budget, **chosen)
    return run_comparison(plan, Path(output), processes=processes, device=device, watch=watch)


def report(folder: str | Path) -> Path:
    """Write report.html of a run again, from the files of its folder, and return its path.

    Raises InputError if there is no summary yet, or it cannot be read.
    """
    return write_report(Path(folder))


def evaluate(folder: str | Path, *, device: str = "cpu", num_samples: int | None = None) -> dict[str, Any]:
    """Measure a run again, from its folder alone; writes its summary, pictures and report anew. Of stages the utility is drawn
    again, of the first model and the last one, or that of the stage in whose folder its recipe put it.

    Raises InputError if `folder` is no run, cannot be written to or is being trained, and for `num_samples` of a pipeline.
    """
    with working_in(Path(folder)):
        if (stage := stage_of(Path(folder))) is not None:
            return evaluate_staged(*stage, device=device, num_samples=num_samples)
        if is_staged(Path(folder)):
            return evaluate_staged(Path(folder), device=device, num_samples=num_samples)
        return evaluate_run(Path(folder), device=device, num_samples=num_samples)


def load(name_or_path: str | Path, device: str = "cpu", *, tilt_strength: float = 1.0) -> Any:
    """A model that can be sampled and tuned, a `Model`, a `TextToImage` or one of another kind: one that ships with tiltflow,
    by its name, or what lies in a folder: a model, the tuned model of a run, or of its last stage, or a pipeline of diffusers.

    >>> load("digits-flow").event_shape
    (1, 28, 28)

    A str without a separator is a name first, so `./digits-flow` is the folder; a Path is always a folder. `from_diffusers`
    takes a pipeline from the hub too, and has its options.

    Args:
        tilt_strength: of a run: 0 is its base, 1 what was tuned, a number between them or beyond a model on the line through
            both: a heuristic, whose law is not that of another temperature (`tiltflow.models.strength`).

    Raises InputError if there is none, if it is a classifier, if its files cannot be read, or for a strength of what is no run.
    """
    given: Any = name_or_path
    if not isinstance(given, (str, Path)):
        raise InputError(f"load: give the name of a model or its folder, not {given!r}")
    check_device(device)
    shipped = asset(name_or_path, "model", INDEX, CONFIG)
    folder = shipped or Path(name_or_path)
    if checked_strength(tilt_strength) != 1:
        return at_strength(*load_both(folder, device), tilt_strength)
    if (folder / INDEX).exists():
        return from_diffusers(folder, device=device)
    if is_staged(folder):
        return load_last(folder, device)
    if is_run_of_other_kind(folder):
        return load_tuned(folder, device)
    named = shipped or name_or_path
    return load_policy(named, device) if is_policy(named) else networks.load(named, device)


def is_run_of_other_kind(folder: Path) -> bool:
    """Whether `folder` is a training run of a model that is no network on tensors, such as a pipeline."""
    path = folder / RECIPE
    model = read_yaml(path).get("model") if path.is_file() else None
    return isinstance(model, dict) and ("path" not in model or "diffusers" in model)


NEW_ADAPTER = Adapter()
M = TypeVar("M", bound=GenerativeModel)


def tune(
    model: M,
    reward: Callable[..., Any],
    method: Any,
    training: Training | None = None,
    *,
    optimizer: Optimizer | None = None,
    conditions: Sequence[Condition] | Tensor | None = None,
    adapter: Adapter | None = NEW_ADAPTER,
    start: M | None = None,
    evaluation: Evaluation | None = None,
    running_reward: RunningReward | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    note: Callable[[str], None] = lambda text: None,
    progress: bool | None = None,
    handle_signals: bool = False,
) -> M:
    """Fine-tune `model` toward p_base(x) exp(r(x) / beta), and return what was tuned.

    Of a network that is a copy, `model` being the base; one with a peft adapter is its own base and is tuned in place. To a
    pipeline's own denoiser it adds a LoRA, so `model` then draws the tuned pictures too, a second call would start from there,
    and `tuned.base()` draws those of the base. Networks are in eval mode meanwhile, and in their owner's mode afterwards.

    Args:
        reward: x [batch, *event] -> [batch], higher is better; for a pipeline, of images [batch, 3, height, width], about
            [-1, 1]. It gets `prompts`, `metadata`, `labels` and `sources`, the pictures that were edited, too, if it has
            arguments called so.
        method: the settings of a method, such as `AdjointMatching(beta=0.5)`.
        training: the loop; settings that mean nothing for the model are refused.
        optimizer: AdamW and its schedule; what is left out is as the method has it by default.
        conditions: for a pipeline, its prompts: texts, or mappings with the key `prompt`, whose other keys are the metadata;
            `image` is the picture that a pipeline that edits edits: a path, an image of PIL or a tensor in [-1, 1].
            For a class-conditional network, the classes that are tuned, by name or number; all by default. For a policy,
            observations [n, observation].
        adapter: the LoRA to add. By default one is added to a pipeline, unless it has one of `with_adapter`, which is then
            trained, and none to a network, of which a copy is trained. None trains the whole network beside a frozen copy.
        start: a model of the same network whose weights the training begins with, with adapter=None; the base, and so the law
            that is aimed at, stay those of `model`. Not for methods that count their law from where they begin.
        evaluation: what is measured after training, for the report in `output`.
        running_reward: f(x [batch, *event], t []) -> [batch], a reward per unit of time for the states on the way to a sample:
            what is maximised is E[sum_k h_k f(x_k, t_k) + r] - beta (path KL), and the law of samples is then not
            p_base exp(r / beta) (`tiltflow.control.objective`). A recipe cannot name one yet.
        output: a folder, new or empty, where settings, metrics, checkpoints, the report and, in `model/`, what was tuned are
            left. Settings of `training` that need one are refused without it.
        callbacks: functions that are called with every record, `Record`; one that returns True ends the training.
        note: is told what a person should know about where a run resumes from, and of alarms.
        progress: whether a progress bar is shown, on standard output; by default it is in a terminal and in a notebook.
        handle_signals: whether signals (`tiltflow.training.signals`) end the training, with a checkpoint in `output`; in the
            main thread alone.

    Raises InputError, before the first step, for what does not fit; NonFiniteError, CollapseError and CheckpointError;
    Interrupted after such a signal. After any of them, and after KeyboardInterrupt, `output` has what was tuned until then.
    """
    seed = whole_number(seed, "tune: seed")
    run = PythonRun.of(model, reward, method, training, optimizer, conditions, evaluation, seed)
    check_calls(callbacks, note, progress)
    bar = tune_progress(progress, run.training.max_train_steps, evaluated=output is not None)
    with deterministic(run.training.deterministic), bar as watch:
        callbacks = [watch, *callbacks]
        if output is None:
            refuse_what_needs_a_folder(run.training, evaluation)
            these = _ready(model, reward, run, conditions, adapter, running_reward, measured=False, start=start)
            with closing(these.parts.loop()) as records:
                for record in records:
                    if asks_to_stop(callbacks, record):
                        break
            return cast(M, these.parts.tuned)
        if running_reward is not None:
            raise InputError(
                "tune: output: its report compares samples with p_base exp(r / beta), which is not the law with a running"
                " reward; leave output out"
            )
        network = model.flow.network
        also = {"model": of_network(network)} if isinstance(network, nn.Module) else {}
        also |= of_pictures(items_of(model, conditions, run.training))
        with RunFolder.begin(Path(output), run, note, also) as place:
            these = _ready(model, reward, run, conditions, adapter, None, measured=True, start=start)
            save_to = partial(_write, these.parts.tuned, run)
            train(run, these, place, save_to=save_to, callbacks=callbacks, handle_signals=handle_signals)
            return cast(M, these.parts.tuned)


def steps(
    model: M,
    reward: Callable[..., Any],
    method: Any,
    training: Training | None = None,
    *,
    optimizer: Optimizer | None = None,
    conditions: Sequence[Condition] | Tensor | None = None,
    adapter: Adapter | None = NEW_ADAPTER,
    running_reward: RunningReward | None = None,
    seed: int = 0,
) -> tuple[M, Generator[Record, None, None]]:
    """`tune`, one optimizer step at a time: what is being tuned, and the loop, which yields a `Record` for every step.

    Whenever the loop is closed, the weights are complete: as of the last step, or their moving average. Nothing is written.

    Raises InputError as `tune` does, and for settings of `training` that need a folder.
    """
    run = PythonRun.of(model, reward, method, training, optimizer, conditions, None, whole_number(seed, "steps: seed"))
    refuse_what_needs_a_folder(run.training)
    these = _ready(model, reward, run, conditions, adapter, running_reward, measured=False)

    def loop() -> Generator[Record, None, None]:
        with deterministic(run.training.deterministic), closing(these.parts.loop()) as records:
            yield from records

    return cast(M, these.parts.tuned), loop()


def steer(
    model: GenerativeModel,
    reward: Callable[..., Any],
    steering: Any,
    num_samples: int | None = None,
    *,
    conditions: Sequence[Condition] | Tensor | None = None,
    sampling: Sampling | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    watch: Callable[[int, int], None] = lambda done, conditions: None,
) -> Steered:
    """Draw samples of `model` as it is that are steered by a reward: without training, at a price for each sample.

    Args:
        reward: as that of `tune`.
        steering: the settings of a kind of steering, such as `BestOfN(n=4)`.
        num_samples: samples of each condition; 64, and of a pipeline 4, by default.
        conditions: as those of `tune`: prompts of a pipeline, classes of a class-conditional network.
        sampling: how the model is sampled; its own by default.
        guidance_scale: classifier-free guidance of a pipeline; the model's own by default.
        batch_size: how many samples the network sees at a time; 256, and of a pipeline 4, by default. The samples depend on it.
        watch: is called with the number of conditions that are done, and that of all, before each.

    Raises InputError for what does not fit, and where the reward fails.
    """
    _check_subject(model, reward, "steer")
    if isinstance(steering, type) or not isinstance(steering, Steering):
        got = f"the class {steering.__name__}" if isinstance(steering, type) else repr(steering)
        raise InputError(f"steer: steering must be the settings of one, such as BestOfN(n=4), is {got}")
    check_sampling(sampling)
    pipeline = isinstance(model, TextToImage)
    if guidance_scale is not None:
        if not isinstance(model, TextToImage):
            raise InputError("steer: guidance_scale: only pipelines have one; leave it out")
        model = replace(model, guidance_scale=checked_scale(guidance_scale))
    items = items_of(model, conditions, Training(), "steer")
    if isinstance(model, TextToImage):
        model.encode_ahead(items)
    return steered(
        model,
        from_function(reward),
        steering,
        items,
        whole_number((4 if pipeline else 64) if num_samples is None else num_samples, "steer: num_samples", 1),
        sampling=sampling,
        batch_size=whole_number((4 if pipeline else 256) if batch_size is None else batch_size, "steer: batch_size", 1),
        seed=whole_number(seed, "steer: seed"),
        watch=watch,
    )


def check_calls(callbacks: Any, note: Any, progress: Any) -> None:
    """Raise InputError for callbacks and a note that cannot be called, and a progress that is neither on nor off."""
    if not isinstance(callbacks, (list, tuple)) or not all(map(callable, callbacks)):
        raise InputError(f"tune: callbacks must be a list of functions of a record, is {callbacks!r}")
    if not callable(note):
        raise InputError(f"tune: note must be a function, is {note!r}")
    if progress not in (None, True, False):
        raise InputError(f"tune: progress must be True, False or None, is {progress!r}")


def check_arguments(model: Any, reward: Any, method: Any, training: Any, evaluation: Any) -> None:
    """Raise InputError, of one line, for arguments of `tune` of another kind, with what was most likely meant."""
    _check_subject(model, reward, "tune")
    if isinstance(method, type) or not isinstance(method, Method):
        got = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise InputError(f"tune: method must be the settings of one, such as AdjointMatching(beta=1.0), is {got}")
    if training is not None and not isinstance(training, Training):
        raise InputError(f"tune: training must be a Training(max_train_steps=.., ..), is {training!r}")
    if evaluation is not None and not isinstance(evaluation, Evaluation):
        raise InputError(f"tune: evaluation must be an Evaluation(num_samples=.., ..), is {evaluation!r}")
    from_function(reward)


def _check_subject(model: Any, reward: Any, verb: str) -> None:
    """Raise InputError for a model that is none, and for the settings of a reward in place of one."""
    if not isinstance(model, GenerativeModel):
        meant = "a Model, what from_diffusers gives, or a GenerativeModel of yours"
        if isinstance(model, (str, Path)):
            meant = f"tiltflow.load({str(model)!r})"
        elif isinstance(model, Flow):
            meant = "Model(flow, event_shape)"
        elif isinstance(model, nn.Module):
            meant = "Model(Flow(network), event_shape)"
        raise InputError(f"{verb}: model must be {meant}, is {type(model).__name__}")
    if isinstance(reward, Settings):
        raise InputError(f"{verb}: reward is the settings of one; give what they build: {type(reward).__name__}(..).build()")


class PythonRun(Settings):
    """What is written down of a run that `tune` began: its settings, and the names of what only the program has."""

    begun_by: Literal["tiltflow.tune"] = "tiltflow.tune"
    description: str = ""
    model: str
    """The class of the network."""
    reward: str
    """The function, or its class."""
    conditions: tuple[str | int | dict[str, Any], ...] = ()
    method: NamedMethod
    optimizer: Optimizer
    training: Training
    evaluation: Evaluation
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        """Runs that an earlier version began have `prompts`, and `sampling` beside the evaluation."""
        if not isinstance(values, dict) or not {"prompts", "sampling"} & values.keys():
            return values
        tree = {key: value for key, value in values.items() if key not in ("prompts", "sampling")}
        return {**tree, "conditions": values.get("prompts", ())}

    @classmethod
    def of(
        cls,
        model: Any,
        reward: Any,
        method: Any,
        training: Training | None,
        optimizer: Optimizer | None,
        conditions: Sequence[Condition] | Tensor | None,
        evaluation: Evaluation | None,
        seed: int,
    ) -> PythonRun:
        """Of the arguments of `tune`, with the defaults of this kind of model. Raises InputError for arguments of another kind,
        and for what cannot be written down."""
        check_arguments(model, reward, method, training, evaluation)
        given, measured = training or Training(), evaluation or Evaluation()
        prompted, network = model.prompted, model.flow.network
        sampling = model.sampling if measured.points is None else None
        tree = {
            "model": type(network.network if isinstance(network, Denoiser) else network).__name__,
            "reward": getattr(reward, "__qualname__", type(reward).__qualname__),
            "conditions": _written(conditions),
            "method": method,
            "optimizer": check_optimizer(method, optimizer),
            "training": given.for_prompts(guided=not isinstance(model, Policy)) if prompted else given.for_samples(),
            "evaluation": measured.for_prompts(sampling) if prompted else measured.for_samples(sampling),
            "seed": seed,
        }
        return validate(cls, tree, "tune")

    @property
    def model_name(self) -> str:
        """The model, as a report says it."""
        return self.model

    @property
    def reward_name(self) -> str:
        """The reward, as a report says it."""
        return self.reward

    @property
    def reward_description(self) -> str:
        """The reward in a sentence."""
        return f"the function {self.reward} of a program"


def _ready(
    model: GenerativeModel,
    reward: Callable[..., Any],
    run: PythonRun,
    conditions: Sequence[Condition] | Tensor | None,
    adapter: Adapter | None,
    running: RunningReward | None,
    *,
    measured: bool,
    start: GenerativeModel | None = None,
) -> Ready:
    """The run that `tune` was asked for, put together and tried.

    Args:
        measured: whether there will be an evaluation.
        start: what the training begins with.
    """
    if start is not None:
        check_warm_start(start, adapter, run.method)
    lifted, items = from_function(reward), items_of(model, conditions, run.training)
    if model.has_decoder and isinstance(lifted, LearnedReward):
        raise InputError("the reward learns from samples, which it cannot from those of a pipeline")

    def trainable() -> tuple[Any, Any]:
        if adapter is NEW_ADAPTER and isinstance(model, TextToImage) and isinstance(model.denoiser, AdaptedDenoiser):
            return model.base(), model
        check_start(adapter, run.method)
        added = None if adapter is NEW_ADAPTER and not isinstance(model, TextToImage) else adapter
        base, tuned = model.trainable(added, run.training.trainable, seed=run.seed)
        if start is not None:
            with refused("tune: start has another network than the model"):
                cast(nn.Module, tuned.flow.network).load_state_dict(cast(nn.Module, start.flow.network).state_dict())
        return base, tuned

    held_out, rehearsed = items if model.prompted else (), measured or model.has_decoder
    these = make_ready(run, model, trainable, lifted, items, held_out, rehearsed=rehearsed, running=running)
    if isinstance(model, Model) and model.network_settings is None and consistency(model).wrong:
        warnings.warn(f"this network is not the velocity field of the law that it samples: {WRONG_CLOCK}", stacklevel=3)
    return these


def items_of(
    model: GenerativeModel, conditions: Sequence[Condition] | Tensor | None, training: Training, verb: str = "tune"
) -> Sequence[Item]:
    """What samples are asked for, from the `conditions` of `tune` or `steer`. Raises InputError for what the model cannot be
    asked for."""
    if not model.prompted:
        if conditions is None:
            return Labels(classes=training.classes).items(model.class_names)[0]
        if not model.class_names:
            raise InputError(f"{verb}: conditions: this model has none; leave them out")
        if training.classes:
            raise InputError(f"{verb}: conditions and training.classes both name classes; give one of the two")
        chosen = as_labels(list(conditions), len(conditions), model.class_names).unique().tolist()
        return Labels(classes=tuple(chosen)).items(model.class_names)[0]
    if isinstance(model, Policy):
        return observations_of(conditions, model.observation_dim, verb)
    if not conditions or isinstance(conditions, str):
        raise InputError(f"{verb}: a pipeline needs conditions=[..], prompts that it draws pictures of")
    rows = [{"prompt": each} if isinstance(each, str) else each for each in conditions]
    texts = unique(from_rows([_with_picture(row) for row in rows], "prompt", f"of {verb}"))
    if not texts:
        raise InputError(f"{verb}: all prompts are blank")
    return texts


def observations_of(conditions: Any, size: int, verb: str) -> Rows:
    """Observations [n, size] as items. Raises InputError for anything else."""
    with refused(f"{verb}: a policy needs conditions=observations, numbers [n, {size}]"):
        observations = torch.as_tensor(conditions, dtype=torch.float32)
    if observations.ndim != 2 or observations.shape[1] != size or not len(observations):
        raise InputError(f"{verb}: conditions must be observations [n, {size}], got {list(observations.shape)}")
    return Rows(observations, torch.arange(len(observations)))


def _written(conditions: Sequence[Condition] | Tensor | None) -> tuple[Any, ...]:
    """Conditions as they are written down: of observations their shape, and a hash of their numbers."""
    if isinstance(conditions, Tensor):
        digest = hashlib.sha256(conditions.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        return (f"observations {list(conditions.shape)} {digest}",)
    return tuple(_with_picture(each, str) for each in conditions or ())


def _with_picture(condition: Any, form: Callable[[Picture], Any] = lambda picture: picture) -> Any:
    """A condition with the picture that it edits, if it has one, in this form. Raises InputError for what is no picture."""
    if not isinstance(condition, Mapping):
        return condition
    given = condition.get(IMAGE)
    return dict(condition) if given is None else {**condition, IMAGE: form(picture_of(given, "tune: conditions"))}


def _write(tuned: GenerativeModel, run: PythonRun, folder: Path) -> None:
    """Save what was tuned; of a network that tiltflow has no words for, the weights: its owner has the rest."""
    if not isinstance(tuned, Model) or tuned.network_settings is not None:
        tuned.save(folder, f"# A model tuned by {run.method.name}\n\nIts settings are `recipe.yaml` of the run.\n")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(cast(nn.Module, tuned.flow.network), folder / WEIGHTS)
