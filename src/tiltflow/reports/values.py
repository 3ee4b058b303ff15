"""Formatting of the values of a summary for the report, and names of those that are not metrics."""

# Mutation tests: none: words

from __future__ import annotations

import re

from tiltflow.evaluation.metrics import Metric, Unit, described
from tiltflow.formatting import Tree, decimal, duration, get, number, percent, size

FACTS = {
    fact.key: fact
    for fact in (
        Metric("model", "Base model", "Model that was tuned; p_base is the law of its samples."),
        Metric("method", "Method", "Algorithm of the training."),
        Metric("reward", "Reward", "r of the target law."),
        Metric(
            "beta",
            "β",
            "Temperature, in units of the reward: the smaller, the stronger the tilt.",
            unit="plain",
        ),
        Metric(
            "working_beta",
            "Working β",
            "Temperature that the method worked at in the end, where it was adapted: to a KL budget, and it is then that of the"
            " target law, or to the mean reward, and it is then the target's if the tuned flow is exact.",
        ),
        Metric("judge.model", "Judge", "Independent classifier, not part of the reward."),
        Metric("seed", "Seed", "The same seed, software and machine give the same run.", unit="plain"),
        Metric("device", "Device", "Device of the run."),
        Metric("threads", "Threads", "CPU threads that torch used."),
        Metric("torch", "PyTorch", "Version of PyTorch."),
        Metric("tiltflow", "Version", "Version of tiltflow."),
    )
}
"""Facts of a run, described and shown like metrics."""

COLUMNS = {"model": "Model", "solver": "Solver", "num_inference_steps": "Steps", "guidance_scale": "Guidance"}
"""Heads of the columns of sampling settings in the table of sampling points."""


def shown(s: Tree, key: str, unit: Unit = "") -> str:
    """Format the number at a dotted key with its error, or return the text there; empty if there is neither."""
    value, measured, error = get(s, key), number(s, key), number(s, f"{key}_error")
    if measured is None:
        return value if isinstance(value, str) else ""
    if unit == "share":
        return percent(measured, error)
    if unit == "seconds":
        return duration(measured)
    if unit == "bytes":
        return size(measured)
    if isinstance(value, int):
        return str(value) if unit == "plain" or abs(value) < 10_000 else f"{value:,}".replace(",", "\u202f")
    return f"{measured:g}" if unit == "plain" else decimal(measured, error)


def measured(s: Tree, key: str) -> str:
    """Format the number at a dotted key of the summary in its unit; empty if there is none."""
    metric = described("summary").get(key) or FACTS.get(key)
    return "" if number(s, key) is None else shown(s, key, metric.unit if metric else "")


def filled(text: str, s: Tree) -> str:
    """Replace each `{dotted.key}` of a title or meaning by that value of the summary."""
    words = {"group": group(s), "kind": str(s.get("target_distance_kind") or "between tuned samples and the target law")}
    return capital(re.sub(r"\{([\w.]+)\}", lambda place: words.get(place[1]) or str(get(s, place[1])), text))


def group(s: Tree) -> str:
    """Name the judge's group of classes."""
    label, names = str(get(s, "judge.group.label") or "the judge's group"), get(s, "judge.class_names")
    parts = label.split(", ")
    if not isinstance(names, list) or not set(parts) <= set(map(str, names)):
        return label
    return f"class {label}" if len(parts) == 1 else f"classes {', '.join(parts[:-1])} and {parts[-1]}"


def capital(text: str) -> str:
    """Capitalise a text, except for a symbol such as β.

    >>> capital("share of 0"), capital("β, fixed"), capital("reward-weighted base")
    ('Share of 0', 'β, fixed', 'Reward-weighted base')
    """
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def small(text: str) -> str:
    """Begin a text with a small letter, except for an abbreviation or a symbol.

    >>> small("Path KL"), small("KL of the law"), small("β, fixed")
    ('path KL', 'KL of the law', 'β, fixed')
    """
    return text if text[1:2].isupper() else text[:1].lower() + text[1:] if text[:1].isascii() else text


def sentence(text: object) -> str:
    """Make a sentence of a text: with a capital and a full stop."""
    words = str(text).strip()
    return capital(words) + ("" if words.endswith((".", "!", "?")) else ".")
