"""The report of a run: one HTML page, complete in itself, that says in words and pictures how close the run came to its aim.

It is written from the files of the run folder alone. What a run did not measure is left out.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from tiltflow import plots
from tiltflow.errors import InputError

Tree = Mapping[str, Any]

FEW = 30
"""Below this effective sample size the importance-weighted target is a handful of samples, and its errors are too small."""

CURVES = {
    "reward": (
        "Reward",
        "Mean reward of each training batch; the shade is the spread of single samples, the dashed line the target law's mean.",
        "Rises and levels off at the dashed line. Below it: train longer. Far above it: the reward is followed too hard.",
    ),
    "path_kl": (
        "Distance from the base",
        "How far the sampler has moved away from the base model's, in nats per sample (path KL).",
        "Starts at 0, rises with the reward and settles. At the target law it equals KL(p* ‖ p_base).",
    ),
    "loss": (
        "Loss",
        "What the optimizer lowers.",
        "Falls, then stays above zero: the rest is noise in what it is fitted to, which no model can remove.",
    ),
    "gradient_norm": (
        "Gradient norm",
        "Length of the gradient before it is clipped.",
        "Noisy, but bounded. Growing spikes mean that the learning rate is too high.",
    ),
    "clipped": (
        "Clipped terms",
        "Share of the terms of the loss that are too large to be used.",
        "Small, and falling: a clipped term teaches nothing.",
    ),
}
"""Of each curve: its title, what it is, what to expect."""

MEASURES = {
    "How close": {
        "judge.group.base": ("Share of {group}, base", "How often the judge sees these classes in samples of the untouched model."),
        "judge.group.tuned": ("Share of {group}, tuned", "The same for the tuned model."),
        "judge.group.target": ("Share of {group}, target", "The same under the target law, from importance-weighted base samples."),
        "reward_base": ("Mean reward, base", "Mean of r over samples of the untouched model."),
        "reward_tuned": ("Mean reward, tuned", "Mean of r over samples of the tuned model, drawn afresh after training."),
        "reward_target": ("Mean reward, target", "Mean of r under the target law: neither less nor more is asked for."),
        "target_distance": ("Distance to the target law", "Between tuned samples and the target law: {kind}."),
        "target_distance_base": ("Distance of the base", "The same for the untouched model: where the run began."),
        "target_distance_floor": ("Floor", "The same between two exact samples of this size. Nothing can be measured to be closer."),
        "reward_distance": (
            "Distance in reward",
            "Largest gap between the cumulative curves of r, tuned against target (Kolmogorov-Smirnov): 0 equal, 1 disjoint.",
        ),
        "path_kl": ("Path KL", "How far the tuned sampler has moved away from the base sampler, in nats per sample."),
    },
    "How sure": {
        "effective_sample_size": ("Effective sample size", "Equally weighted samples that would tell as much about the target law."),
        "num_samples": ("Samples", "Drawn from each of the two models for this evaluation."),
        "judge.confidence_base": ("Judge's confidence, base", "Mean probability that the judge gives to the class it decides for."),
        "judge.confidence_tuned": ("Judge's confidence, tuned", "The same. A clear fall means samples that look less like the data."),
    },
    "What it cost": {
        "seconds": ("Training time", "Wall-clock time of the training loop."),
        "seconds_total": ("Total time", "With loading, sampling and evaluation."),
        "network_evaluations": ("Network evaluations", "Samples that the two networks were evaluated on in training, together."),
        "evaluations_per_iteration": ("Evaluations per iteration", "The same for one step of the optimizer."),
        "iterations": ("Iterations", "Steps of the optimizer."),
    },
    "What was run": {
        "model": ("Base model", "The model that was tuned; p_base is the law of its samples."),
        "method": ("Method", "The algorithm that tuned it."),
        "reward": ("Reward", "The r of the target law."),
        "beta": ("β", "Temperature, in units of reward: small follows the reward, large stays with the base."),
        "judge.model": ("Judge", "A classifier that was never part of the reward."),
        "seed": ("Seed", "With the same seed, software and machine, the same run."),
        "device": ("Device", "Where it ran."),
        "threads": ("Threads", "CPU threads that torch used."),
        "torch": ("torch", "Version."),
        "tiltflow": ("tiltflow", "Version."),
    },
}
"""Key of the summary (dotted into mappings): title, and what it is."""

TOLD_ELSEWHERE = {"name", "description", "reward_description", "target_law", "target_distance_kind"}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from the files there, and return its path.

    Raises InputError if summary.json cannot be read; any other file may be missing.
    """
    summary = _read_summary(folder / "summary.json")
    recipe = folder / "recipe.yaml"
    html = render(
        summary,
        _read_records(folder / "metrics.jsonl"),
        pictures=[(folder / name).read_bytes() for name in ("before.png", "after.png") if (folder / name).exists()],
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
        name=folder.resolve().name,
    )
    path, part = folder / "report.html", folder / "report.html.part"
    part.write_text(html, encoding="utf-8")
    os.replace(part, path)
    return path


def render(s: Tree, rows: Sequence[Tree], *, pictures: Sequence[bytes], recipe: str, name: str) -> str:
    """The page: from the summary, the training records, the before and after pictures (PNG) and the recipe of a run."""
    sections = [
        _tiles(s),
        _pictures(pictures),
        _closeness(s),
        _histogram(s),
        _law(s),
        _curves(s, rows),
        _measures(s),
        _commands(name),
        _section("The recipe", f"<pre>{escape(recipe)}</pre>") if recipe else "",
    ]
    return Template(PAGE).substitute(
        title=escape(str(s.get("name") or name)),
        css=CSS,
        script=SCRIPT,
        headline=escape(headline(s)),
        description=f'<p class="lede">{escape(str(s["description"]))}</p>' if s.get("description") else "",
        sections="\n".join(filter(None, sections)),
    )


def headline(s: Tree) -> str:
    """The run in one sentence: the judge's group if there is one, else the mean reward."""
    for key, subject, form in (("judge.group", _group(s), _percent), ("reward", "The mean reward", _decimal)):
        base, tuned, target = (_number(s, _join(key, which)) for which in ("base", "tuned", "target"))
        if base is not None and tuned is not None:
            aim = f"; the target law asks for {form(target)}" if target is not None else ""
            return f"{subject} went from {form(base)} to {form(tuned)}{aim}."
    return f"What the run {s.get('name') or ''} measured".replace("  ", " ")


def verdict(s: Tree) -> tuple[str, str]:
    """("good", "fair" or "poor", one sentence) on the distance to the target law; two empty strings if it was not measured."""
    distance, base, floor = (_number(s, f"target_distance{part}") for part in ("", "_base", "_floor"))
    if distance is None:
        return "", ""
    slack, floor = 2 * (_number(s, "target_distance_error") or 0.0), floor or 0.0
    if distance <= floor + slack:
        return "good", "At this sample size, the tuned model cannot be told from the target law."
    if base is None or base <= floor:
        return "fair", "The tuned model can be told from the target law."
    if distance >= base - slack:
        return "poor", "The tuned model is not measurably closer to the target law than the base model."
    way = (base - distance) / (base - floor)
    return ("good" if way > 0.9 else "fair"), f"The tuned model has come {min(way, 0.99):.0%} of the way to the target law."


def _tiles(s: Tree) -> str:
    tiles = []
    for key, title, form in (("judge.group", _group(s), _percent), ("reward", "Mean reward", _decimal)):
        base, tuned, target = (_number(s, _join(key, which)) for which in ("base", "tuned", "target"))
        if tuned is not None:
            change = f"<i>{form(base)} →</i> {form(tuned)}" if base is not None else form(tuned)
            aim = form(target, _number(s, _join(key, "target_error"))) if target is not None else ""
            tiles.append((title, change, f"target {aim}" if aim else ""))
    if (distance := _number(s, "target_distance")) is not None:
        base, floor = _number(s, "target_distance_base"), _number(s, "target_distance_floor")
        change = f"<i>{_decimal(base)} →</i> {_decimal(distance)}" if base is not None else _decimal(distance)
        tiles.append(("Distance to the target law", change, f"floor {_decimal(floor)}" if floor is not None else ""))
    for key, title, note in (
        ("effective_sample_size", "Effective sample size", "of {num_samples} base samples"),
        ("path_kl", "Path KL from the base", "nats per sample"),
        ("seconds", "Training time", "{iterations} iterations"),
    ):
        if _number(s, key) is not None:
            filled = _fill(note, s)
            tiles.append((title, _value(s, key), filled))
    cells = "".join(
        f'<div class="tile"><h3>{escape(title)}</h3><p class="big">{value}</p><p>{escape(note)}</p></div>'
        for title, value, note in tiles
    )
    return f'<section class="tiles">{cells}</section>' if tiles else ""


def _pictures(pictures: Sequence[bytes]) -> str:
    if len(pictures) != 2:
        return ""
    shown = "".join(
        f'<figure class="{name}"><img src="data:image/png;base64,{base64.b64encode(data).decode()}" '
        f'alt="A grid of samples {name} tuning"><figcaption>{name}</figcaption></figure>'
        for name, data in zip(("before", "after"), pictures, strict=True)
    )
    return _section(
        "Before and after",
        f'<div class="compare">{shown}<span class="handle"></span>'
        '<input type="range" min="0" max="100" value="50" step="1" autocomplete="off" hidden '
        'aria-label="How much of the picture shows the samples before tuning"></div>',
        "Same cell, same starting noise: what changed in a cell is what the tuning did.",
    )


def _closeness(s: Tree) -> str:
    """The verdict, the numbers behind it on a scale, and whether the mean reward agrees."""
    tone, sentence = verdict(s)
    distance, base, floor = (_number(s, f"target_distance{part}") for part in ("", "_base", "_floor"))
    parts = []
    if distance is not None:
        parts.append(f'<p class="verdict {tone}">{sentence}</p>')
        said = [f"<b>{_decimal(distance, _number(s, 'target_distance_error'))}</b> for the tuned model"]
        said += [f"{_decimal(base)} for the base model"] if base is not None else []
        said += [f"two exact samples of this size differ by {_decimal(floor)}"] if floor is not None else []
        kind = f" The distance is the {escape(str(s['target_distance_kind']))}." if s.get("target_distance_kind") else ""
        parts.append(f"<p>{'; '.join(said)}.{kind} Zero means equal in this measure, not equal in every respect.</p>")
        parts.append(_scale(distance, base, floor) if base else "")
    parts.append(_reward_agrees(s))
    return _section("How close to the target law?", "".join(parts)) if any(parts) else ""


def _scale(tuned: float, base: float, floor: float | None) -> str:
    longest = 1.04 * max(tuned, base, floor or 0.0)
    marks = "".join(
        f'<span class="mark {name}{" left" if value > longest / 2 else ""}" style="left:{100 * value / longest:.2f}%">'
        f"<b>{label} {_decimal(value)}</b></span>"
        for name, label, value in (("base", "base", base), ("floor", "exact sample", floor), ("tuned", "tuned", tuned))
        if value is not None
    )
    return f'<div class="scale" aria-hidden="true">{marks}<span class="end">0 = target law</span></div>'


def _reward_agrees(s: Tree) -> str:
    tuned, target = _number(s, "reward_tuned"), _number(s, "reward_target")
    if tuned is None or target is None:
        return ""
    errors = [_number(s, f"reward_{which}_error") for which in ("tuned", "target")]
    both = f"{_decimal(tuned, errors[0])} against {_decimal(target, errors[1])} under the target law"
    if None in errors:
        return f"<p>Mean reward: {both}.</p>"
    if abs(tuned - target) <= 2 * math.hypot(*(e for e in errors if e is not None)):
        return f"<p>The mean reward agrees, within two standard errors: {both}.</p>"
    says = "lower: the tuning stopped short" if tuned < target else "higher: the tuning went further than asked"
    return f"<p>The mean reward is measurably {says}: {both}.</p>"


def _histogram(s: Tree) -> str:
    judge = s.get("judge") or {}
    lists = [judge.get(key) for key in ("base", "tuned", "target", "class_names")]
    if not all(isinstance(part, list) and part and len(part) == len(lists[0] or ()) for part in lists):
        return ""
    base, tuned, target, names = (part or [] for part in lists)
    error = judge.get("target_error")
    svg = plots.class_histogram(base, tuned, target, error if error and len(error) == len(names) else None, list(map(str, names)))
    note = "A second classifier, the judge, was never part of the reward. This is what it sees; bars show one standard error."
    before, after = _number(s, "judge.confidence_base"), _number(s, "judge.confidence_tuned")
    sure = ""
    if before is not None and after is not None:
        fell = " A fall like this one often means samples that look less like the data." if after < before - 0.05 else ""
        sure = f"<p>It is {_percent(after)} sure of the tuned samples and was {_percent(before)} sure of the base ones.{fell}</p>"
    return _section("What the judge sees", f'<div class="plot" role="img" aria-label="Share of each class">{svg}</div>{sure}', note)


def _law(s: Tree) -> str:
    if not s.get("target_law"):
        return ""
    law = escape(str(s["target_law"]))
    for plain, pretty in (("p_base", "p<sub>base</sub>"), ("beta", "β"), ("exp(", "exp("), ("r(x)/β", "r(x) / β")):
        law = law.replace(plain, pretty)
    reward = ": ".join(escape(str(s[key])) for key in ("reward", "reward_description") if s.get(key))
    terms = [("p<sub>base</sub>", f"the law of the base model{_named(s, 'model')}. Where it puts nothing, nothing can appear.")]
    terms += [("r(x)", f"the reward of a sample. {reward}")] if reward else []
    terms += [("β", "")] if False else []
    if (beta := _number(s, "beta")) is not None:
        terms.append((f"β = {_decimal(beta)}", f"the price: {_decimal(beta)} more reward makes a sample e ≈ 2.7 times as likely."))
    terms.append(("p*", "keeps variety: samples of equal reward stay as likely, to each other, as they were in the base model."))
    listed = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in terms)
    return _section("What the run aims at", f'<p class="formula">p*(x) &nbsp;∝&nbsp; {law}</p><dl>{listed}</dl>{_weights(s)}')


def _weights(s: Tree) -> str:
    size = _number(s, "effective_sample_size")
    if size is None:
        return ""
    of, worth = _fill("{num_samples} ", s), _decimal(size)
    text = (
        f"<p>The target law cannot be sampled directly. {of}base samples stand for it, each with a weight proportional to "
        f"exp(r / β). A few weigh much, most little: together they tell as much as <b>{worth}</b> samples of equal weight would, "
        "the effective sample size.</p>"
    )
    if size >= FEW:
        return text
    return text + (
        f'<p class="warning" role="note"><b>Only {worth} effective samples.</b> Every number here that says “target” is rough, and '
        f"its standard error too small. Below {FEW}, evaluate with more samples, or choose a larger β.</p>"
    )


def _curves(s: Tree, rows: Sequence[Tree]) -> str:
    cards = []
    target = _number(s, "reward_target")
    for key, (title, meaning, expect) in CURVES.items():
        if not any(_number(row, key) for row in rows):  # not measured, or zero throughout
            continue
        svg = plots.curves(rows, [key], references={"reward": target} if target is not None else None)
        cards.append(
            f'<figure class="card"><h3>{title}</h3><div class="plot" role="img" aria-label="Curve: {title}">{svg}</div>'
            f"<figcaption>{meaning}<br><b>Expect:</b> {expect}</figcaption></figure>"
        )
    note = "Thin: each iteration. Bold: running mean."
    return _section("How the training went", f'<div class="cards">{"".join(cards)}</div>', note) if cards else ""


def _measures(s: Tree) -> str:
    known = {key for measures in MEASURES.values() for key in measures}
    rest = {key: (key, "") for key in s if key not in known | TOLD_ELSEWHERE and key.removesuffix("_error") not in known}
    kind = str(s.get("target_distance_kind") or "see the recipe")
    bodies = []
    for heading, measures in {**MEASURES, "Also measured": rest}.items():
        lines = "".join(
            f"<tr><th>{escape(title.format(group=_group(s).lower()) if meaning else title)}</th>"
            f"<td>{_value(s, key)}</td><td>{escape(meaning.replace('{kind}', kind))}</td></tr>"
            for key, (title, meaning) in measures.items()
            if _value(s, key)
        )
        bodies.append(f'<tbody><tr><th colspan="3" class="group">{heading}</th></tr>{lines}</tbody>' if lines else "")
    return _section("Everything measured", f"<table>{''.join(bodies)}</table>", "After ± is one standard error.")


def _commands(name: str) -> str:
    run = shlex.quote(name)
    lines = [
        ("new samples", f"tiltflow sample {run}"),
        ("measure it again", f"tiltflow evaluate {run}"),
        ("train it again", f"tiltflow train {run}/recipe.yaml"),
        ("in Python", f"model = tiltflow.load({name!r})"),
    ]
    listed = "".join(f"<dt>{what}</dt><dd><code>{escape(command)}</code></dd>" for what, command in lines)
    return _section("Use it", f'<dl class="commands">{listed}</dl>', "From the folder above this run's.")


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{f'<p class=note>{note}</p>' if note else ''}{body}</section>"
