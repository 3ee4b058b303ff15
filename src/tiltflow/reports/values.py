"""Values of a summary as the report writes them, and what they are called."""

# Mutation tests: none: words

from __future__ import annotations

import re

from tiltflow.evaluation.metrics import Metric, Unit, described
from tiltflow.formatting import Tree, decimal, duration, get, number, percent

FACTS = {
    fact.key: fact
    for fact in (
        Metric("model", "Base model", "The model that was tuned; p_base is the law of its samples."),
        Metric("method", "Method", "The algorithm that tuned it."),
        Metric("reward", "Reward", "The r of the target law."),
        Metric(
            "beta",
            "β",
            "Temperature, in units of reward: small follows the reward, large stays with the base.",
            unit="plain",
        ),
        Metric(
            "working_beta",
            "Working β",
            "Where the calibrated temperature ended; the target's own β where the tuned flow is exact.",
        ),
        Metric("judge.model", "Judge", "A classifier that was never part of the reward."),
        Metric("seed", "Seed", "The same seed, software and machine give the same run.", unit="plain"),
        Metric("device", "Device", "Where it ran."),
        Metric("threads", "Threads", "CPU threads that torch used."),
        Metric("torch", "PyTorch", "Its version."),
        Metric("tiltflow", "Version", "Of tiltflow."),
    )
}
"""What was run: not measured, but described and shown as metrics are."""

COLUMNS = {"model": "Model", "solver": "Solver", "num_inference_steps": "Steps", "guidance_scale": "Guidance"}
"""Heads of the columns of the table of sampling points that say how was sampled."""


def shown(s: Tree, key: str, unit: Unit = "") -> str:
    """The value at a dotted key with its error, or the text there; empty if it is neither."""
    value, measured, error = get(s, key), number(s, key), number(s, f"{key}_error")
    if measured is None:
        return value if isinstance(value, str) else ""
    if unit == "share":
        return percent(measured, error)
    if unit == "seconds":
        return duration(measured)
    if isinstance(value, int):
        return str(value) if unit == "plain" or abs(value) < 10_000 else f"{value:,}".replace(",", "\u202f")
    return f"{measured:g}" if unit == "plain" else decimal(measured, error)


def measured(s: Tree, key: str) -> str:
    """The number at a dotted key of the summary as its description says; empty if there is none."""
    metric = described("summary").get(key) or FACTS.get(key)
    return "" if number(s, key) is None else shown(s, key, metric.unit if metric else "")


def filled(text: str, s: Tree) -> str:
    """A title or a meaning with the values of the summary in place of `{dotted.key}`."""
    words = {"group": group(s), "kind": str(s.get("target_distance_kind") or "between tuned samples and the target law")}
    return capital(re.sub(r"\{([\w.]+)\}", lambda place: words.get(place[1]) or str(get(s, place[1])), text))


def group(s: Tree) -> str:
    """The judge's group of classes in words."""
    label, names = str(get(s, "judge.group.label") or "the judge's group"), get(s, "judge.class_names")
    parts = label.split(", ")
    if not isinstance(names, list) or not set(parts) <= set(map(str, names)):
        return label
    return f"class {label}" if len(parts) == 1 else f"classes {', '.join(parts[:-1])} and {parts[-1]}"


def capital(text: str) -> str:
    """The text with a capital, except for symbols: the capital of β is no sign of the temperature.

    >>> capital("share of 0"), capital("β, fixed"), capital("reward-weighted base")
    ('Share of 0', 'β, fixed', 'Reward-weighted base')
    """
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def sentence(text: object) -> str:
    """The text with a capital and a full stop."""
    words = str(text).strip()
    return capital(words) + ("" if words.endswith((".", "!", "?")) else ".")
