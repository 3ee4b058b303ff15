"""Measure a run: the base and the tuned model alike, from the same noise; writes summary.json, pictures and report.html."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow import __version__, processes
from tiltflow.chemistry.atoms import molecules_of
from tiltflow.chemistry.molecule_files import to_xyz
from tiltflow.control.path_kl import tuned_paths
from tiltflow.errors import UserCodeError
from tiltflow.evaluation import metrics
from tiltflow.evaluation.achieved_tilt import far_in_words
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.evaluation.metrics import judge
from tiltflow.evaluation.molecules import are_molecules, evenly
from tiltflow.evaluation.monitor import over_groups
from tiltflow.evaluation.pictures import is_video
from tiltflow.evaluation.samples import Asked, Instruments, Samples, Seen, samples_of
from tiltflow.evaluation.settings import Point
from tiltflow.evaluation.table import BaseSamples, Drawn, draw_all, in_words
from tiltflow.evaluation.verdict import Row, conclude, mean_test, of_rewards
from tiltflow.files import final_name, write_file, write_json, write_text
from tiltflow.formatting import decimal
from tiltflow.laws.target import Target
from tiltflow.methods import Tilting
from tiltflow.models.protocol import GenerativeModel
from tiltflow.pictures import batch_of, edited
from tiltflow.reports.molecules import molecule_grid
from tiltflow.reports.plots import image_grid
from tiltflow.reports.points import are_points, draw, frame
from tiltflow.reports.report import write_report
from tiltflow.reports.videos import FRAMES_OF_REPORT, PER_SECOND, frames_in_rows, save_gif, spaced
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.checked import values_of
from tiltflow.rewards.functions.prompted import given
from tiltflow.runs.caveats import (
    annealing_in_words,
    budget_in_words,
    calibration_in_words,
    failed_in_words,
    few_steps_limits,
    guidance_limits,
    learned_in_words,
    left_out_in_words,
    modes_in_words,
    reach_in_words,
    weights_in_words,
)
from tiltflow.runs.looks import of_monitor
from tiltflow.runs.reached import TILT_OF_PATHS, balance, of_achieved_tilt, states_of, tilt_of_paths
from tiltflow.runs.recipe import RunSettings
from tiltflow.runs.run_files import read_records
from tiltflow.streams import stream
from tiltflow.training.base_statistics import BaseStatistics
from tiltflow.training.method import Method
from tiltflow.training.records import speed

Record = Mapping[str, Any]
COLUMNS = 6
"""Of a picture of molecules."""
MOST_PATHS, PATHS_OF_PROMPTS = 256, 32
"""For the path KL, each of which costs as much as two samples; with prompts, at least so many."""

NO_VALUES = (
    "The reward is the first variation of a utility that is known by its gradient alone: its values are not, and read as 0."
)

NO_LAW = "The method raises the mean reward, and aims at no law that samples could be compared with."


@torch.no_grad()
def evaluate(
    run: RunSettings,
    folder: Path,
    base: GenerativeModel,
    tuned: GenerativeModel,
    asked: Asked,
    instruments: Instruments,
    *,
    seconds: float | None = None,
    base_samples: BaseSamples | None = None,
) -> dict[str, Any]:
    """Measure the tuned model of a run beside its base, and write what was found into its folder. Returns the summary.

    Args:
        base, tuned: in the precision of the training.
        asked: the samples that are measured.
        seconds: what the run took until now; by default its training.
        base_samples: see `draw_all`.
    """
    began, records = time.perf_counter(), read_records(folder)
    settings, target = run.evaluation, method_at(run, records[-1]).target(records[-1]["step"], base.grid)
    table, (of_base, of_tuned) = draw_all(settings, base, tuned, asked, instruments, seed=run.seed, base_samples=base_samples)
    tilted = units_of_target(run, base, instruments)
    samples = compared(target, asked, of_base, of_tuned, instruments, tilted)
    failed = failed_in_words(of_base.failed[instruments.own], of_tuned.failed[instruments.own], len(asked), records)
    generator = stream(run.seed, "bootstrap")
    budget = budget_in_words(run.training.target_kl, records)
    calibrated = calibration_in_words(target.beta, records[-1].get("beta") if budget["target_kl"] is None else None)
    # a gain at its limit has not made the mean reward what it should be
    reached = calibrated["calibration_at_limit"] is not False
    entries, tests = of_laws(samples, instruments.own, generator, counted=reached)
    found = metrics.measure(Seen(samples, instruments, settings, generator))
    states = states_of(run, tuned, samples, instruments)
    summary: dict[str, Any] = {
        **described(run, target, folder, base, asked),
        "iterations": records[-1]["step"],
        "working_beta": records[-1].get("beta"),
        "calibration_at_limit": calibrated["calibration_at_limit"],
        **budget,
        "limits": [
            *reach_in_words(target),
            *learned_in_words(instruments.rewards[instruments.own]),
            *calibrated["limits"],
            *budget["limits"],
            *annealing_in_words(target.beta, records[-1]),
            *weights_in_words(records[-1]),
            *guidance_limits(run.training.guidance_mode),
            *few_steps_limits(base, run.method),
            *left_out_in_words(*samples.left_out, len(asked)),
            *failed.pop("limits"),
        ],
        **failed,
        **mean_rewards(samples, of_base, of_tuned, asked, instruments.own),
        **entries,
        **of_paths(run, target, tuned, base, asked, instruments, tilted),
        "diversity_in": in_words(instruments, settings.features, base, of_base.x),
        "table": table,
        "seconds": records[-1]["seconds"],
        "network_evaluations": records[-1]["network_evaluations"],
        "samples_drawn": records[-1].get("samples_drawn"),
        **speed(records),
        **of_monitor(folder),
        **found.entries,
        **of_achieved_tilt(run, target, base, tuned, states, tilted),
        **balance(run, target, base, tuned, states),
    }
    if guided(base, asked, settings.first):
        # of the law of guided samples: not to be held against paths without guidance
        summary |= dict.fromkeys(("path_kl_target", "path_kl_target_error"))
    summary["limits"] += modes_in_words(summary)
    if summary["target_unknown"] is not None and target.reaches == "exact":
        summary["limits"] += far_in_words(summary, rounds="inverse_temperature" in records[-1])
    summary |= conclude([*tests, *found.tests], summary)
    summary["seconds_total"] = (seconds or records[-1]["seconds"]) + time.perf_counter() - began
    drawn = landscape(instruments.rewards[instruments.own], asked, base.device)
    rewards = of_base.rewards[instruments.own], of_tuned.rewards[instruments.own]
    return written(folder, summary, of_base.x, of_tuned.x, asked, settings.grid, drawn, rewards)


@torch.no_grad()
def glance(
    run: RunSettings,
    record: Record,
    base: GenerativeModel,
    tuned: GenerativeModel,
    asked: Asked,
    instruments: Instruments,
    *,
    base_samples: BaseSamples | None = None,
) -> dict[str, Any]:
    """What of the summary is known soonest: of rewards, their laws and the judge, and the table. Nothing is written.

    Args:
        record: of the last optimizer step.
        base_samples: see `draw_all`.
    """
    target = method_at(run, record).target(record["step"], base.grid)
    table, (of_base, of_tuned) = draw_all(
        run.evaluation, base, tuned, asked, instruments, seed=run.seed, base_samples=base_samples
    )
    samples = compared(target, asked, of_base, of_tuned, instruments, units_of_target(run, base, instruments))
    generator = stream(run.seed, "bootstrap")
    entries, _ = of_laws(samples, instruments.own, generator, counted=True)
    judged = judge.measure(Seen(samples, instruments, run.evaluation, generator)).entries  # whose distance comes first
    return {**mean_rewards(samples, of_base, of_tuned, asked, instruments.own), **entries, **judged, "table": table}


def method_at(run: RunSettings, record: Record) -> Method:
    """The method as it worked at an optimizer step: a KL budget has set its temperature."""
    return run.method if run.training.target_kl is None else run.method.at_temperature(record["beta"])


def described(run: RunSettings, target: Target, folder: Path, base: GenerativeModel, asked: Asked) -> dict[str, Any]:
    """What was run, where, and what it aims at."""
    of_group = f", r in standard deviations of the base's for its {asked.kind}" if run.training.per_prompt_normalization else ""
    return {
        "tiltflow": __version__,
        "torch": torch.__version__,
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "name": final_name(folder),
        "description": run.description,
        "model": run.model_name,
        "method": run.method.name,
        "beta": target.beta,
        "target_law": None if target.maximises else target.words + of_group,
        "reaches": target.reaches,
        "reward": run.reward_name,
        "reward_description": run.reward_description,
        "max_train_steps": run.training.max_train_steps,
        "seed": run.seed,
        "num_samples": len(asked),
        **({asked_for(asked): asked.groups} if asked.kind == "prompt" else {}),
    }


def asked_for(asked: Asked) -> str:
    """The name of how many prompts, or observations, there are."""
    return "num_observations" if "observation" in asked.items[0].metadata else "num_prompts"


# ---- samples ----


def compared(
    target: Target,
    asked: Asked,
    of_base: Drawn,
    of_tuned: Drawn,
    instruments: Instruments,
    tilted: Callable[[Tensor, Asked], Tensor],
) -> Samples:
    """The samples that are compared with the target law, and why they cannot be where they cannot."""
    units = tilted(of_base.rewards[instruments.own], asked)
    samples = samples_of(asked, of_base.x, of_tuned.x, of_base.rewards, of_tuned.rewards, units, target.log_tilt)
    if target.maximises:
        return replace(samples, absent=NO_LAW)
    valued = getattr(instruments.rewards[instruments.own], "valued", True)
    return samples if valued else replace(samples, absent=NO_VALUES)


def units_of_target(run: RunSettings, base: GenerativeModel, instruments: Instruments) -> Callable[[Tensor, Asked], Tensor]:
    """(rewards [n] of samples, what they are of) -> the rewards as the target law tilts by them: normalised if the training's
    are."""
    reward = instruments.rewards[instruments.own]
    statistics = BaseStatistics(run.training, run.method.sampling, base, reward, run.seed)

    def normalised(rewards: Tensor, asked: Asked) -> Tensor:
        mean, std = statistics([item.text for item in asked.items], [item.metadata for item in asked.items])
        return (rewards - mean) / std

    return normalised if run.training.per_prompt_normalization else lambda rewards, asked: rewards


def guided(model: GenerativeModel, asked: Asked, point: Point) -> bool:
    """Whether samples are drawn with guidance by negative prompts."""
    _, negative = model.conditions(asked.items[:1])
    scale = model.guidance_scale if point.guidance_scale is None else point.guidance_scale
    return negative is not None and scale != 1


# ---- numbers ----


def of_laws(samples: Samples, own: str, generator: torch.Generator, *, counted: bool) -> tuple[dict[str, Any], list[Row]]:
    """What the rewards say of the target law: entries of the summary, and a test of the mean of each reward and class."""
    base, tuned, weights, asked = samples.base_rewards, samples.tuned_rewards, samples.weights, samples.asked
    kind = asked.kind if asked.kind != "sample" else "class"
    entries, tests = of_rewards(tuned[own], base[own], weights, generator, counted=counted, group=kind)
    if entries["target_unknown"] is None:
        tests += [mean_test(f"mean {name}", tuned[name], base[name], weights) for name in base if name != own]
        if asked.strata and asked.groups > 1:
            tests += of_classes(tuned[own], base[own], samples.log_tilt, asked.names)
    return entries, tests


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


def mean_rewards(samples: Samples, of_base: Drawn, of_tuned: Drawn, asked: Asked, own: str) -> dict[str, Any]:
    """Mean rewards of base and tuned model, and of their difference, sample by sample."""
    base, tuned = of_base.rewards[own], of_tuned.rewards[own]
    if asked.kind != "prompt":
        base, tuned = samples.base_rewards[own], samples.tuned_rewards[own]
    gain = of_tuned.rewards[own].double() - of_base.rewards[own].double()
    return {
        **over_groups(base, asked.together).named("reward_base"),
        **over_groups(tuned, asked.together).named("reward_tuned"),
        **over_groups(gain, asked.together).named("reward_gain"),
    }


def of_paths(
    run: RunSettings,
    target: Target,
    tuned: GenerativeModel,
    base: GenerativeModel,
    asked: Asked,
    instruments: Instruments,
    tilted: Callable[[Tensor, Asked], Tensor],
) -> dict[str, Any]:
    """`path_kl` of the summary, fresh and with its standard error: of the memoryless samplers of both models, without guidance,
    on the grid that the evaluation samples on; and the achieved tilt of these paths. None, and `path_kl_absent` says why, for a
    method that tunes a solver without noise."""
    settings = run.evaluation
    if why := no_paths(run.method, tuned):
        return {**dict.fromkeys(("path_kl", "path_kl_error", *TILT_OF_PATHS)), "path_kl_absent": why}
    chosen = asked_of_paths(asked)
    paths = tuned_paths(tuned, base, chosen.items, settings.first, seed=run.seed, batch_size=settings.at_once)
    tilt = partial(tilt_of_paths, run, target, tuned, chosen, paths, instruments, tilted)
    return {
        **over_groups(paths.costs.cpu(), chosen.together).named("path_kl"),
        **(tilt() if isinstance(run.method, Tilting) else dict.fromkeys(TILT_OF_PATHS)),
        "path_kl_absent": None,
    }


def no_paths(method: Method, tuned: GenerativeModel) -> str | None:
    """Why a method, which tunes a solver without noise, leaves no path KL; None where there is one."""
    solver = method.sampling
    return solver.limits(tuned.grid)[0] if isinstance(method, Tilting) and not solver.has_noise else None


def asked_of_paths(asked: Asked) -> Asked:
    """The samples whose paths are looked at: of each class as many, of as many prompts as possible."""
    if asked.kind != "prompt":
        return asked.some(max(1, min(MOST_PATHS, len(asked)) // asked.groups))
    prompts = [asked.items[i * asked.size] for i in range(min(asked.groups, PATHS_OF_PROMPTS))]
    return Asked.of_prompts(prompts, max(2, PATHS_OF_PROMPTS // len(prompts)) if len(prompts) < PATHS_OF_PROMPTS else 1)


# ---- files ----


def landscape(reward: Reward, asked: Asked, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """A reward as a picture of points shows it; None for one that is known by its gradient alone, or differs between groups."""
    if asked.groups > 1 or not getattr(reward, "valued", True):
        return None
    item = asked.items[0]

    def heights(points: Tensor) -> Tensor:
        bound = given(reward, len(points) * [item.text], len(points) * [item.metadata])
        try:
            return values_of(bound, points.to(device)).detach().cpu()
        except UserCodeError:  # there are no samples at most of these points
            return torch.full((len(points),), math.nan)

    return heights


def written(
    folder: Path,
    summary: dict[str, Any],
    x_base: Tensor,
    x: Tensor,
    asked: Asked,
    most: int,
    reward: Callable[[Tensor], Tensor] | None,
    rewards: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Write the summary, the report, and pictures if the samples can be drawn; by the main process. Returns the summary."""
    files, about = pictures_of(x_base, x, asked, most, reward)
    if are_molecules(x):
        files, about = molecules_in_files((x_base, x), rewards, most)
    elif about and not are_points(x):
        about |= cells_of(x, rewards, asked, most)
    if about:
        summary["pictures"] = about
    if not processes.is_main():
        return summary
    for name, write in files.items():
        write_file(folder / name, write)
    if asked.kind == "prompt":
        write_text(folder / "prompts.txt", "\n".join(asked.names) + "\n")
    write_json(folder / "summary.json", summary)
    write_report(folder)
    return summary


def pictures_of(
    x_base: Tensor, x: Tensor, asked: Asked, most: int, reward: Callable[[Tensor], Tensor] | None
) -> tuple[dict[str, Callable[[Path], object]], dict[str, Any]]:
    """Return what writes the files of the pictures before and after tuning, by name, and what the summary says of them; nothing
    for samples that are no pictures. Of videos the first of each group is shown, moving and as a row of frames. Of points
    all are, with the reward around them."""
    if are_points(x):
        limits = frame([x_base, x])
        clouds = ((name, each, colour) for name, each, colour in (("before", x_base, "base"), ("after", x, "tuned")))
        return {f"{name}.png": draw(each, limits, colour, reward) for name, each, colour in clouds}, {"rows": 1}
    columns, both = columns_of(asked, most), {"before": x_base, "after": x}
    if videos := is_video(x.shape[1:]):
        columns, both = 1, {name: each[:: asked.size] for name, each in both.items()}
    elif not (x.ndim == 4 and x.shape[1] in (1, 3)):
        return {}, {}
    elif asked.strata and asked.groups > 1:  # a column for each class
        both = {name: each.unflatten(0, (columns, -1)).transpose(0, 1).flatten(0, 1) for name, each in both.items()}
    rows = math.ceil(min(len(both["after"]), most) / columns)
    about: dict[str, Any] = {"rows": rows, **({"prompts": list(asked.names[:rows])} if asked.kind == "prompt" else {})}
    sources = [picture for i in range(rows) if (picture := edited(asked.items[i * columns].metadata)) is not None]
    if sources:  # each row begins with the picture that is edited
        about["images"] = list(map(str, sources))
        first = batch_of(sources, *x.shape[-2:]).to(x).split(1)
        for name, each in both.items():
            parts = each[:most].split(columns)
            both[name] = torch.cat([part for row in zip(first, parts, strict=True) for part in row])
        columns, most = columns + 1, most + rows
    files: dict[str, Callable[[Path], object]] = {}
    for name, each in both.items():
        if videos:
            files[f"{name}.gif"] = partial(save_gif, spaced(each[:most], FRAMES_OF_REPORT), 1, seconds=x.shape[1] / PER_SECOND)
        grid = frames_in_rows(each[:most]) if videos else image_grid(each[:most], columns)
        files[f"{name}.png"] = partial(grid.save, format="png")
    return files, about | ({"frames": x.shape[1]} if videos else {})


def cells_of(x: Tensor, rewards: tuple[Tensor, Tensor], asked: Asked, most: int) -> dict[str, Any]:
    """What the summary says of the cells of `pictures_of`: how many a row has, and the rewards of the sample in each before and
    after tuning; None for one without a reward."""
    columns, both = columns_of(asked, most), list(rewards)
    if is_video(x.shape[1:]):
        columns, both = 1, [each[:: asked.size] for each in both]
    elif asked.strata and asked.groups > 1:
        both = [each.unflatten(0, (columns, -1)).T.flatten() for each in both]
    known = ([float(f"{value:.6g}") if math.isfinite(value) else None for value in each[:most].tolist()] for each in both)
    return {"columns": columns, "rewards": dict(zip(("before", "after"), known, strict=True))}


def molecules_in_files(
    both: tuple[Tensor, Tensor], rewards: tuple[Tensor, Tensor], most: int
) -> tuple[dict[str, Callable[[Path], object]], dict[str, Any]]:
    """What writes molecules of samples before and after tuning, with their rewards [n], as pictures and as files of atoms, and
    what the summary says of them."""
    files: dict[str, Callable[[Path], object]] = {}
    which = evenly(len(both[0]), most)
    for name, x, values in zip(("before", "after"), both, rewards, strict=True):
        molecules, numbers = molecules_of(x[which]), values[which].tolist()
        files[f"{name}.xyz"] = partial(Path.write_text, data=to_xyz(molecules, numbers), encoding="utf-8")
        files[f"{name}.png"] = partial(molecule_grid(molecules, COLUMNS, list(map(decimal, numbers))).save, format="png")
    return files, {"rows": math.ceil(len(which) / COLUMNS), "molecules": len(which)}


def columns_of(asked: Asked, most: int) -> int:
    """Columns of the grid of pictures: the samples of a prompt are a row, those of a class a column; else it is a square."""
    if asked.groups == 1:
        return 8 if asked.kind == "prompt" else max(1, round(most**0.5))
    return asked.groups if asked.strata else asked.size
