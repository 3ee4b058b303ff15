"""The report of a run: one HTML page, complete in itself, that says in words and pictures how close the run came to its aim.

It is written from the files of the run folder alone; what a run did not measure is left out. `report.html` beside this file is
the look of the page, this file the words.
"""

# Mutation tests: none: words and pages

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from tiltflow.evaluation.monitor import read_looks
from tiltflow.files import read_json, trusted, write_text
from tiltflow.formatting import decimal, duration, get, number, percent
from tiltflow.reports import plots
from tiltflow.training.records import known_records

Tree = Mapping[str, Any]
TEMPLATE = Path(__file__).with_suffix(".html")

CURVES = {
    "reward": (
        "Reward",
        "Mean reward of each training batch; the shade is the spread of single samples, the dashed line the target law's mean.",
        "rises and levels off at the dashed line. Below it: train longer. Far above it: the reward is followed too hard.",
    ),
    "path_kl": (
        "Distance from the base",
        "How far the sampler has moved away from the base model's, in nats per sample (path KL): one batch each, of the chain"
        " that is trained. The dashed line is the KL divergence of the target law from the base's.",
        "starts at 0, rises with the reward and settles near the dashed line, or above it where the temperature was lowered.",
    ),
    "loss": (
        "Loss",
        "What the optimizer lowers.",
        "falls, then stays above zero: the rest is noise in what it is fitted to, which no model can remove.",
    ),
    "objective": (
        "Objective",
        "Mean reward minus β times the path KL: what the policy is trained to raise.",
        "rises and levels off. While it falls, the steps are too large, or the critic is wrong.",
    ),
    "step_kl": (
        "Size of an update",
        "Path KL between the policies before and after the updates on one batch, in nats.",
        "stays near or below its target, `target_kl`.",
    ),
    "critic_loss": (
        "Critic's loss",
        "Squared error of the value function, in units of the first batch's spread of rewards.",
        "falls from one half to the part of the reward that is still undecided along a trajectory.",
    ),
    "gradient_norm": (
        "Gradient norm",
        "Length of the gradient before it is clipped.",
        "noisy, but bounded. Growing spikes mean that the learning rate is too high.",
    ),
    "effective_sample_size": (
        "Effective sample size",
        "Samples of equal weight that would teach as much as the weighted ones of a round.",
        "a good part of the batch. Where it falls to a few samples, the model learns to make those few.",
    ),
    "velocity_distance": (
        "Distance of the velocities",
        "Mean square of v - v_base, summed over dimensions: the Wasserstein penalty before its weight.",
        "rising from 0, then flat: the rounds have settled.",
    ),
    "clipped": (
        "Clipped terms",
        "Share of the terms of the loss that are too large to be used.",
        "small, and falling: a clipped term teaches nothing.",
    ),
}
"""Of each training record's key: title, what it is, what to expect."""

MEASURES = {
    "How close": {
        "judge.group.base": ("Share of {group}, base", "How often the judge sees them in samples of the untouched model."),
        "judge.group.tuned": ("Share of {group}, tuned", "The same for the tuned model."),
        "judge.group.target": ("Share of {group}, target", "The same under the target law, from weighted base samples."),
        "reward_base": ("Mean reward, base", "Mean of r over samples of the untouched model."),
        "reward_tuned": ("Mean reward, tuned", "Mean of r over samples of the tuned model, drawn afresh after training."),
        "reward_gain": ("Gain in reward", "Tuned minus base, picture by picture: of the same prompts and noise."),
        "reward_target": ("Mean reward, target", "Mean of r under the target law: neither less nor more is asked for."),
        "reward_target_bias": (
            "Bias taken from it",
            "By how much the weighted mean was off, as few samples of a group pull it toward the base (jackknife).",
        ),
        "target_distance": (
            "Distance to the target law",
            "{kind}. After ± stands how much it varies from sample to sample: no interval for the distance, which finite"
            " samples make larger, by about the floor.",
        ),
        "target_distance_base": ("Distance of the base", "The same for the untouched model: where the run began."),
        "target_distance_floor": (
            "Floor",
            "The mean of the same where nothing is wrong: between samples drawn from the weighted base samples, and these drawn"
            " again.",
        ),
        "reward_distance": (
            "Distance in reward",
            "Largest gap between the cumulative curves of r, tuned against target (Kolmogorov-Smirnov): 0 equal, 1 disjoint.",
        ),
        "reward_distance_floor": ("Distance in reward, floor", "The mean of the same where nothing is wrong."),
        "own_law_balance": (
            "Balance",
            "Pull of the reward over the penalty: 1 at the law at which the rounds settle. Above: on its way. Below: noise.",
        ),
        "own_law_balance_expected": (
            "Balance, expected",
            "Of so many rounds, each fitted perfectly, to first order.",
        ),
        "path_kl": (
            "Path KL",
            "How far the tuned memoryless sampler has moved away from the base's, in nats per sample, on fresh paths.",
        ),
        "path_kl_target": (
            "KL of the target",
            "Of the target law from the base's, in nats, from the weights: what the path KL is at an exact tilt in many steps.",
        ),
    },
    "How sure": {
        "effective_sample_size": (
            "Effective sample size",
            "Samples of equal weight that would tell as much about the target law.",
        ),
        "effective_sample_size_of_group": (
            "Effective sample size of a group",
            "The same of one prompt, or one condition: the harmonic mean over all of them.",
        ),
        "num_samples": ("Samples", "Drawn from each of the two models for this evaluation."),
        "num_prompts": ("Prompts", "Held out from training."),
        "judge.frechet_base": (
            "Fréchet distance, base",
            "Between Gaussian fits to the judge's features of samples and of real images; lower is better.",
        ),
        "judge.frechet_tuned": ("Fréchet distance, tuned", "The same for the tuned model."),
        "judge.frechet_real": ("Fréchet distance, real", "The same between two halves of the real images."),
        "judge.sure_base": ("Judge is sure, base", "Share of samples whose likeliest class has a probability above {sure}."),
        "judge.sure_tuned": ("Judge is sure, tuned", "The same for the tuned model."),
        "judge.confidence_base": (
            "Judge's confidence, base",
            "Mean probability that the judge gives to the class it decides for.",
        ),
        "judge.confidence_tuned": (
            "Judge's confidence, tuned",
            "The same. A clear fall means samples that look less like the data.",
        ),
    },
    "How varied": {
        "judge.entropy_base": ("Entropy of classes, base", "Of the judge's class histogram, in nats; 0 if one class is left."),
        "judge.entropy_tuned": ("Entropy of classes, tuned", "The same for the tuned model."),
        "judge.variance_base": (
            "Variance of features, base",
            "How much samples differ from each other: the trace of the covariance of the judge's features.",
        ),
        "judge.variance_tuned": ("Variance of features, tuned", "The same for the tuned model."),
        "w2_base": ("W2 to the base", "2-Wasserstein distance between samples of the two models ({space})."),
        "w2_floor": ("W2, floor", "The same between two samples of the base: what finite samples leave."),
    },
    "What it cost": {
        "seconds": ("Training time", "Wall-clock time of the training loop."),
        "seconds_total": ("Total time", "With loading, sampling and evaluation."),
        "network_evaluations": ("Network evaluations", "Samples that the two networks saw in training, counted together."),
        "samples_drawn": ("Samples drawn", "By the model in training, to learn from; each counted once."),
        "evaluations_per_iteration": ("Evaluations per iteration", "The same for one step of the optimizer."),
        "iterations": ("Iterations", "Steps of the optimizer."),
        "max_train_steps": ("Iterations asked for", "Fewer were done where the run was interrupted."),
    },
    "What was run": {
        "model": ("Base model", "The model that was tuned; p_base is the law of its samples."),
        "method": ("Method", "The algorithm that tuned it."),
        "reward": ("Reward", "The r of the target law."),
        "beta": ("β", "Temperature, in units of reward: small follows the reward, large stays with the base."),
        "working_beta": (
            "Working β",
            "Where the calibrated temperature ended; the target's own β where the tuned flow is exact.",
        ),
        "judge.model": ("Judge", "A classifier that was never part of the reward."),
        "seed": ("Seed", "The same seed, software and machine give the same run."),
        "device": ("Device", "Where it ran."),
        "threads": ("Threads", "CPU threads that torch used."),
        "torch": ("PyTorch", "Its version."),
        "tiltflow": ("Version", "Of tiltflow."),
    },
}
"""Of each key of the summary (dotted into its mappings): title, what it is."""

POINTS = {
    "model": "Model",
    "solver": "Solver",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "variance": "Variance",
    "vendi": "Vendi",
    "fid": "FID",
    "kid": "KID",
}
"""Of each column of the table that is not a reward: title."""

TOLD_ELSEWHERE = {
    "name",
    "description",
    "reward_description",
    "target_law",
    "target_distance_kind",
    "limits",
    "table",
    "diversity_in",
    "alarm",
    "alarm_step",
    "best_step",
    "best_by",
    "pictures",
    "w2_space",
    "verdict",
    "tests",
    "target_unknown",
    "path_kl_absent",
    "calibration_at_limit",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from the files there, and return its path.

    Raises InputError if summary.json cannot be read; any other file may be missing.
    """
    pictures = [folder / "before.png", folder / "after.png"]
    recipe = folder / "recipe.yaml"
    source = folder / "summary.json"
    summary = read_json(source)
    with trusted(source):
        page = render(
            summary,
            known_records(folder)[0],
            looks=read_looks(folder),
            pictures=[path.read_bytes() for path in pictures if path.exists()],
            recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
            folder=folder.resolve().name,
        )
    path = folder / "report.html"
    write_text(path, page)
    return path


def render(
    s: Tree, records: Sequence[Tree], *, pictures: Sequence[bytes], recipe: str, folder: str, looks: Sequence[Tree] = ()
) -> str:
    """The page: from the summary, the training records, the before and after pictures (PNG), the recipe of a run, and what its
    monitor saw."""
    name = str(s.get("name") or folder)
    sections = [
        _alarm(s),
        _tiles(s),
        _pictures(s, pictures),
        _closeness(s),
        _tests(s),
        _histogram(s),
        _law(s),
        _curves(s, records),
        _looks(s, looks),
        _table(s),
        _measures(s),
        _commands(s, folder),
        _section("The recipe", f"<pre>{escape(recipe)}</pre>") if recipe else "",
    ]
    facts = [name, *(str(s[key]) for key in ("model", "method") if s.get(key))]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(name),
        kicker=escape(" · ".join(facts)),
        headline=escape(headline(s)),
        description=f'<p class="lede">{escape(_sentence(s["description"]))}</p>' if s.get("description") else "",
        sections="\n".join(filter(None, sections)),
        footer=escape(f"Written by tiltflow {s.get('tiltflow') or ''}".strip() + "."),
    )


@dataclass(frozen=True)
class Change:
    """A number before and after tuning, and what the target law says."""

    subject: str
    base: float | None
    tuned: float
    target: float | None
    target_error: float | None
    form: Callable[..., str]


def _changes(s: Tree) -> list[Change]:
    """The shares of the judge's group and the mean reward, as far as they were measured."""
    changes = []
    for stem, subject, form in (("judge.group.", _group(s), percent), ("reward_", "the mean reward", decimal)):
        tuned = number(s, f"{stem}tuned")
        if tuned is not None:
            target, error = (number(s, stem + key) for key in ("target", "target_error"))
            changes.append(Change(subject, number(s, f"{stem}base"), tuned, target, error, form))
    return changes


def _group(s: Tree) -> str:
    label, names = str(get(s, "judge.group.label") or "the judge's group"), get(s, "judge.class_names")
    parts = label.split(", ")
    if not isinstance(names, list) or not set(parts) <= set(map(str, names)):
        return label
    return f"class {label}" if len(parts) == 1 else f"classes {', '.join(parts[:-1])} and {parts[-1]}"


def headline(s: Tree) -> str:
    """The run in one sentence: the judge's group if there is one, else the mean reward."""
    changes = _changes(s)
    if not changes:
        return f"A run of {s.get('method') or 'tiltflow'}"
    c = changes[0]
    before, after = None if c.base is None else c.form(c.base), c.form(c.tuned)
    change = f"is {after}" if before is None else f"stayed at {after}" if before == after else f"went from {before} to {after}"
    return _sentence(
        f"{c.subject} {change}" + (f"; the target law asks for {c.form(c.target)}" if c.target is not None else "")
    )


def _tiles(s: Tree) -> str:
    tiles = []
    for c in _changes(s):
        aim = f"target {c.form(c.target, c.target_error)}" if c.target is not None else ""
        tiles.append((c.subject, _arrow(c.base, c.tuned, c.form), aim))
    if (distance := number(s, "target_distance")) is not None:
        title, change = "distance to the target law", _arrow(number(s, "target_distance_base"), distance, decimal)
        tiles.append((title, change, _with(s, "target_distance_floor", "if nothing is wrong: {}")))
    for key, title, note in (
        ("effective_sample_size", "effective sample size", _with(s, "num_samples", "of {} base samples")),
        ("path_kl", "path KL from the base", _with(s, "path_kl_target", "target {}, ") + "nats per sample"),
        ("seconds", "training time", f"{show(s, 'iterations')} iteration{'' if get(s, 'iterations') == 1 else 's'}"),
    ):
        if (value := number(s, key)) is not None:
            tiles.append((title, decimal(value) if key == "path_kl" else show(s, key), note))
    cells = "".join(
        f'<div class="tile"><h3>{escape(capital(title))}</h3><p class="big">{value}</p><p>{note}</p></div>'
        for title, value, note in tiles
    )
    return f'<section class="tiles">{cells}</section>' if tiles else ""


def _arrow(base: float | None, tuned: float, form: Callable[..., str]) -> str:
    """What was, and what is; once where both read alike."""
    return form(tuned) if base is None or form(base) == form(tuned) else f"<i>{form(base)} →</i> {form(tuned)}"


def _pictures(s: Tree, pictures: Sequence[bytes]) -> str:
    """Each row of samples before tuning, right above the same row after it: one looks from a cell to the one below."""
    if len(pictures) != 2:
        return ""
    opened = [Image.open(io.BytesIO(data)) for data in pictures]
    rows, prompts = get(s, "pictures.rows"), get(s, "pictures.prompts") or []
    count = rows if isinstance(rows, int) and 0 < rows <= min(picture.height for picture in opened) else 1
    pairs = zip(*(plots.grid_rows(picture, count) for picture in opened), strict=True)
    shown = ""
    for i, pair in enumerate(pairs):
        prompt = str(prompts[i]) if i < len(prompts) else ""
        what = escape(prompt or f"Row {i + 1} of the samples")
        caption = f"<figcaption>{escape(prompt)}</figcaption>" if prompt else ""
        strips = "".join(
            f'<img class="{name}" src="data:image/png;base64,{_png(strip)}" width="{strip.width}" height="{strip.height}"'
            f' alt="{what}, {name} tuning">'
            for name, strip in zip(("before", "after"), pair, strict=True)
        )
        shown += f'<figure class="pair">{caption}{strips}</figure>'
    key = '<b class="before">before</b> tuning, and right below it the same <b class="after">after</b>'
    note = f"Each row {key}: from the same noise, so that what differs between the two is what the tuning did."
    return _section("Before and after", f'<div class="pairs">{shown}</div>', note)


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def _closeness(s: Tree) -> str:
    """The verdict and the numbers behind it, in words and on a scale; how far the paths went; what is not exact by itself."""
    distance, base, floor = (number(s, f"target_distance{x}") for x in ("", "_base", "_floor"))
    tone, sentence = get(s, "verdict.tone"), get(s, "verdict.text")
    parts = []
    if isinstance(sentence, str):
        parts.append(f'<p class="verdict {tone if tone in ("good", "fair", "poor") else "fair"}">{escape(sentence)}</p>')
    if distance is not None:
        said = [f"The distance is <b>{decimal(distance, number(s, 'target_distance_error'))}</b>"]
        said += [f"the base model began at {decimal(base)}"] if base is not None else []
        said += [f"where nothing is wrong, samples of this size leave {decimal(floor)}"] if floor is not None else []
        kind = f" It is the {escape(str(s['target_distance_kind']))}." if s.get("target_distance_kind") else ""
        parts.append(f"<p>{'; '.join(said)}.{kind} Zero means equal by this measure, not equal in every respect.</p>")
        parts.append(_scale(distance, base, floor) if base else "")
    parts.append(_mean_reward(s))
    parts.append(_paths(s))
    if (balance := number(s, "own_law_balance")) is not None:
        error = number(s, "own_law_balance_error") or 0.0
        if balance < 1 - 2 * error:
            says = (
                "it has moved further than its reward pulls: noise, of the fit or of rounds with few samples, is part of what"
                " it learned"
            )
        else:
            says = "it is there, within two standard errors" if balance < 1 + 2 * error else "it is still on its way there"
        parts.append(
            "<p>The law at which the rounds of this method settle is no exponential tilt. Where they settle, the pull of the"
            f" reward is in balance with the penalty. The model has <b>{decimal(balance, error)}</b> of the one for the other"
            f"{_with(s, 'own_law_balance_expected', ', so many rounds, each fitted perfectly, {}')}: {says}.</p>"
        )
    limits = s.get("limits")
    if isinstance(limits, list) and limits:
        parts.append(f'<p class="warning"><b>Limits of this run.</b> {" ".join(escape(str(limit)) for limit in limits)}</p>')
    if s.get("target_unknown"):
        parts.append(
            '<p class="warning"><b>The target law is not known.</b> Evaluate with more samples, or choose a weaker tilt (a'
            " larger β): until then no number of this run says how close it came.</p>"
        )
    return _section("How close to the target law?", "".join(parts)) if any(parts) else ""


def _mean_reward(s: Tree) -> str:
    tuned, target = number(s, "reward_tuned"), number(s, "reward_target")
    if tuned is None or target is None:
        return ""
    errors = [number(s, f"reward_{which}_error") or 0.0 for which in ("tuned", "target")]
    bias = number(s, "reward_target_bias")
    noted = "" if bias is None else f", from which a bias of {decimal(bias)} by too few samples of each has been taken"
    return f"<p>The mean reward is {decimal(tuned, errors[0])}; the target law has {decimal(target, errors[1])}{noted}.</p>"


def _paths(s: Tree) -> str:
    paths, target = number(s, "path_kl"), number(s, "path_kl_target")
    if paths is None:
        absent = s.get("path_kl_absent")
        return f"<p>There is no path KL. {escape(str(absent))}</p>" if absent else ""
    said = f"The path KL from the base is {decimal(paths, number(s, 'path_kl_error'))} nats"
    if target is not None:
        said += (
            f"; the target law itself is {decimal(target, number(s, 'path_kl_target_error'))} nats from the base, and no path"
            " that leads to it costs less"
        )
    return f"<p>{said}.</p>"


def _tests(s: Tree) -> str:
    """Each test as a row: what was measured, what the target law has, and whether they differ by more than chance."""
    tests = s.get("tests")
    if not isinstance(tests, list) or not tests or not all(isinstance(row, Mapping) for row in tests):
        return ""
    rows = []
    for row in tests:
        form = percent if row.get("unit") == "share" else decimal
        tuned, target = (
            "–" if (value := number(row, key)) is None else form(value, number(row, f"{key}_error"))
            for key in ("tuned", "target")
        )
        z, p = (number(row, key) for key in ("z", "p_holm"))
        seen = number(row, "detectable")
        off = "–" if seen is None else f"{decimal(100 * seen)} points" if row.get("unit") == "share" else decimal(seen)
        says = "not counted" if not row.get("counted") else "yes" if row.get("rejected") else "not seen"
        cells = [
            tuned,
            target,
            "–" if z is None else f"{z:+.1f}".replace("-", "−"),
            "–" if p is None else "&lt; 0.001" if p < 1e-3 else decimal(p),
            off,
            says,
        ]
        name = escape(str(row.get("statistic", "")))
        rows.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    note = (
        "Tuned against target, with the errors of both. p is corrected for the number of tests (Holm): below 0.05 they differ"
        " by more than chance. Would see: the deviation that is found four times in five; of a distance, the smallest that is"
        " found. The target of a distance is what is left where nothing is wrong."
    )
    table = _numbers(("Statistic", "Tuned", "Target", "z", "p", "Would see", "Differs"), "".join(rows))
    return _section("What was tested", table, note)


def _scale(tuned: float, base: float, floor: float | None) -> str:
    longest = 1.04 * max(tuned, base, floor or 0.0)
    crowded = floor is not None and abs(base - floor) < longest / 2  # both have their words below the line
    marks = "".join(
        f'<span class="mark {name}{" left" if value > longest / 2 else ""}{" low" if crowded else ""}"'
        f' style="left:{100 * value / longest:.2f}%"><b>{label} {decimal(value)}</b></span>'
        for name, label, value in (("base", "base", base), ("floor", "floor", floor), ("tuned", "tuned", tuned))
        if value is not None
    )
    return f'<div class="scale" aria-hidden="true">{marks}</div>'


def _histogram(s: Tree) -> str:
    base, tuned, target, names, error = (
        get(s, f"judge.{key}") or [] for key in ("base", "tuned", "target", "class_names", "target_error")
    )
    if not names or not len(base) == len(tuned) == len(names) or len(target) not in (0, len(names)):
        return ""
    errors = error if len(error) == len(names) else None
    svg = plots.class_histogram(base, tuned, target, errors, [str(name) for name in names])
    before, after = number(s, "judge.confidence_base"), number(s, "judge.confidence_tuned")
    sure = ""
    if before is not None and after is not None:
        fell = " A fall like this often means samples that look less like the data." if after < before - 0.05 else ""
        sure = f"<p>It is {percent(after)} sure of the tuned samples; of the base samples it was {percent(before)}.{fell}</p>"
    note = "The judge is a classifier that was never part of the reward. Error bars are one standard error."
    shown = _plot(svg, "Share of each class", "alone") + _classes(names, base, tuned, target, errors, number(s, "num_samples"))
    return _section("What the judge sees", shown + sure, note)


def _classes(
    names: Sequence[str],
    base: Sequence[float],
    tuned: Sequence[float],
    target: Sequence[float],
    target_error: Sequence[float] | None,
    count: float | None,
) -> str:
    """The share of each class in numbers; that of `count` independent samples has the error of a proportion."""

    def shares(values: Sequence[float], errors: Sequence[float] | None) -> list[str]:
        return [percent(value, errors[i] if errors else None) for i, value in enumerate(values)]

    of_samples = [[math.sqrt(p * (1 - p) / count) for p in values] if count else None for values in (base, tuned)]
    known = shares(target, target_error) or ["–"] * len(names)
    columns = [shares(base, of_samples[0]), shares(tuned, of_samples[1]), known]
    body = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th>' + "".join(f"<td>{value}</td>" for value in row) + "</tr>"
        for name, *row in zip(names, *columns, strict=True)
    )
    table = _numbers(("Class", "Base", "Tuned", "Target"), body)
    return f"<details><summary>Each class in numbers</summary>{table}</details>"


def _law(s: Tree) -> str:
    if not s.get("target_law"):
        return ""
    law = escape(str(s["target_law"])).replace("p_base", "p<sub>base</sub>").replace("beta", "β")
    reward = ": ".join(escape(str(s[key])) for key in ("reward", "reward_description") if s.get(key))
    model = f", {escape(str(s['model']))}" if s.get("model") else ""
    terms = [("p<sub>base</sub>", f"the law of the base model{model}. What it never makes, the target never asks for.")]
    terms += [("r(x)", f"the reward of a sample, {reward}.")] if reward else []
    if (beta := number(s, "beta")) is not None:
        terms.append(
            (f"β = {beta:g}", f"the exchange rate: {beta:g} more reward makes a sample e ≈ 2.7 times as likely as before.")
        )
    terms.append(("p*", "keeps the variety: samples of equal reward are as likely, to one another, as they were before."))
    listed = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in terms)
    size, weights = number(s, "effective_sample_size"), ""
    if size is not None:
        weights = (
            "<p>The target law cannot be sampled directly. "
            f"Base samples{_with(s, 'num_samples', ', {} of them,')} stand for it, "
            "each with its weight p*(x)/p<sub>base</sub>(x). The weights are uneven; together the samples tell as much as "
            f"<b>{decimal(size)}</b> of equal weight would: the effective sample size.</p>"
        )
    return _section("What the run aims at", f'<p class="formula">p*(x) ∝ {law}</p><dl>{listed}</dl>{weights}')


def _curves(s: Tree, records: Sequence[Tree]) -> str:
    targets = {"reward": number(s, "reward_target"), "path_kl": number(s, "path_kl_target")}
    references = {key: value for key, value in targets.items() if value is not None}
    cards = "".join(
        f'<figure class="card"><h3>{title}</h3>{_plot(plots.curves(records, [key], references=references), title)}'
        f"<figcaption>{meaning} <b>Expect:</b> {expect}</figcaption></figure>"
        for key, (title, meaning, expect) in CURVES.items()
        if any(number(record, key) for record in records)  # measured, and not zero throughout
    )
    note = "Thin: each iteration. Bold: the running mean."
    return _section("How the training went", f'<div class="cards">{cards}</div>', note) if cards else ""


def _alarm(s: Tree) -> str:
    """The monitor's warning, where nobody can miss it."""
    if not s.get("alarm"):
        return ""
    best = f" The best model by {s['best_by']}, of step {s['best_step']}, is in best/." if s.get("best_step") else ""
    text = f"{_sentence(s['alarm'])} Look at the pictures.{best}"
    return f'<p class="warning"><b>This looks like reward hacking.</b> {escape(text)}</p>'


def _looks(s: Tree, looks: Sequence[Tree]) -> str:
    if len(looks) < 2:
        return ""
    cards = "".join(
        f'<figure class="card"><h3>{escape(capital(name))}</h3>{_plot(plots.looks(looks, name), name)}</figure>'
        for name in looks[0]["measures"]
    )
    note = (
        "From the same noise each time, with one standard error; the first point is the base. Dashed: the target law, where"
        " base samples say what it is. A line across: the first alarm."
    )
    if s.get("best_step"):
        note += f" Best by {s['best_by']}: step {s['best_step']}, kept in best/."
    return _section("What training did not see", f'<div class="cards">{cards}</div>', escape(note))


def _table(s: Tree) -> str:
    """Each way to sample as a row, as the papers print them."""
    rows = s.get("table")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return ""
    columns = [key for key in rows[0] if not key.endswith("_error")]
    body = "".join("<tr>" + "".join(f"<td>{show(row, key) or '–'}</td>" for key in columns) + "</tr>" for row in rows)
    note = (
        f"Held-out prompts: {s.get('num_prompts')}. After ± stands one standard error over prompts. Variance and Vendi score,"
        f" the effective number of different pictures of a prompt, in {s.get('diversity_in')}."
    )
    return _section("Rewards and diversity", _numbers([POINTS.get(key, key) for key in columns], body), escape(note))


def _numbers(heads: Sequence[str], body: str) -> str:
    """A table that keeps its columns, and is scrolled where the screen is narrow."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    table = f'<table class="numbers"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'


def _measures(s: Tree) -> str:
    known = {key for measures in MEASURES.values() for key in measures}
    rest = {
        key: (key.replace("_", " "), "")
        for key in s
        if key.removesuffix("_error") not in known and key not in TOLD_ELSEWHERE and number(s, key) is not None
    }
    words = {
        "{group}": _group(s),
        "{sure}": str(get(s, "judge.sure_above")),
        "{space}": str(s.get("w2_space")),
        "{kind}": str(s.get("target_distance_kind") or "between tuned samples and the target law"),
    }
    bodies = []
    for heading, measures in {**MEASURES, "Also measured": rest}.items():
        rows = "".join(
            f'<tr><th>{_filled(title, words)}</th><td class="value">{value}</td>'
            f'<td class="what">{_filled(what, words)}</td></tr>'
            for key, (title, what) in measures.items()
            if (value := show(s, key))
        )
        bodies.append(f'<tbody><tr><th colspan="3" class="group">{heading}</th></tr>{rows}</tbody>' if rows else "")
    return _section(
        "Everything measured",
        f"<table>{''.join(bodies)}</table>",
        "After ± stands one standard error; after that of a distance to the target, how much it varies from sample to sample.",
    )


def commands(s: Tree, folder: str) -> dict[str, str]:
    """What can be done with a run, as typed in the folder that holds its folder: what it is for, and the command."""
    run, prompts = f"./{folder}", get(s, "pictures.prompts")
    prompt = ["--prompt", str(prompts[0])] if prompts else []
    typed = {
        "new samples": ["sample", run, *prompt, "--output", f"{run}-samples.png"],
        "measure it again": ["evaluate", run],
        "train it again": ["train", f"{run}/recipe.yaml", "--output", f"{run}-again"],
    }
    if prompts:
        typed["for plain diffusers"] = ["export", run, "--output", f"{run}-exported"]
    return {what: shlex.join(["tiltflow", *words]) for what, words in typed.items()}


def _commands(s: Tree, folder: str) -> str:
    typed = commands(s, folder) | {"in Python": f"model = tiltflow.load({f'./{folder}'!r})"}
    listed = "".join(f"<dt>{what}</dt><dd><code>{escape(command)}</code></dd>" for what, command in typed.items())
    return _section("Use it", f'<dl class="commands">{listed}</dl>', "From the folder that holds this run's folder:")


def _section(title: str, body: str, note: str = "") -> str:
    noted = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{noted}{body}</section>"


def _plot(svg: str, label: str, kind: str = "") -> str:
    scrolls = ' tabindex="0"' if kind else ""
    return f'<div class="plot {kind}" role="img" aria-label="{escape(label)}"{scrolls}>{svg}</div>'


def _sentence(text: object) -> str:
    words = str(text).strip()
    return capital(words) + ("" if words.endswith((".", "!", "?")) else ".")


def _with(s: Tree, key: str, words: str) -> str:
    """`words` around the value of `key`, nothing if it was not measured."""
    return words.format(value) if (value := show(s, key)) else ""


def _filled(text: str, words: Mapping[str, str]) -> str:
    for place, word in words.items():
        text = text.replace(place, word)
    return escape(capital(text))


def capital(text: str) -> str:
    """With a capital, but for what is a symbol: the capital of β is no sign of the temperature.

    >>> capital("share of 0"), capital("β, fixed"), capital("reward-weighted base")
    ('Share of 0', 'β, fixed', 'Reward-weighted base')
    """
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def show(s: Tree, key: str) -> str:
    """The value at a dotted key as the page shows it, escaped; empty if there is none, or if it is not one value."""
    value, measured = get(s, key), number(s, key)
    if measured is None:
        return escape(value) if isinstance(value, str) else ""
    if key.startswith(("judge.group.", "judge.confidence_")):
        return percent(measured, number(s, f"{key}_error"))
    if key.startswith("seconds"):
        return duration(measured)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 and key != "seed" else str(value)
    return f"{measured:g}" if key == "beta" else decimal(measured, number(s, f"{key}_error"))
