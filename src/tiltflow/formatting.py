"""Numbers as people read them: as many digits as their error allows, shares in percent, times in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Tree = Mapping[str, Any]


def get(s: Tree, key: str) -> Any:
    """The value at a dotted key, None if there is none.

    >>> get({"judge": {"model": "digits-judge"}}, "judge.model"), get({"judge": None}, "judge.model")
    ('digits-judge', None)
    """
    value: Any = s
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def number(s: Tree, key: str) -> float | None:
    """The finite number at a dotted key, None if there is none."""
    value = get(s, key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def decimal(value: float, error: float | None = None) -> str:
    """A number in three digits, or in as many as its standard error leaves.

    >>> decimal(-0.4), decimal(0.06), decimal(812.3), decimal(7.93, 0.1), decimal(3e-6)
    ('−0.40', '0.060', '812', '7.93 ± 0.10', '3e−06')
    """
    if error is not None and 1e-6 < error < math.inf:
        digits = max(0, 1 - math.floor(math.log10(error)))
        text = f"{value:.{digits}f} ± {error:.{digits}f}"
    elif value and not 1e-3 <= abs(value) < 1e6:
        text = f"{value:.3g}"
    else:
        digits = 3 if 0 < abs(value) < 0.1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        text = f"{value:.{digits}f}"
    return text.replace("-", "−")


def told_apart(values: Sequence[float]) -> list[str]:
    """Numbers as `decimal` writes them, in more digits where these do not tell them apart.

    >>> told_apart([29.5015, 29.5517]), told_apart([0.17, 0.52]), told_apart([3.0])
    (['29.50', '29.55'], ['0.17', '0.52'], ['3.00'])
    """
    spread = max(values) - min(values) if values else 0.0
    digits = -math.floor(math.log10(spread)) if spread > 1e-6 else 0
    texts = map(decimal, values)
    return [
        f"{value:.{digits}f}".replace("-", "−") if "e" not in text and digits > len(text.partition(".")[2]) else text
        for value, text in zip(values, texts, strict=True)
    ]


def percent(value: float, error: float | None = None) -> str:
    """
    >>> percent(0.484), percent(0.9991), percent(0.943, 0.012)
    ('48%', '99.9%', '94.3 ± 1.2%')
    """
    if error:
        return f"{decimal(100 * value, 100 * error)}%"
    return f"{100 * value:.0f}%" if 0.01 <= value <= 0.99 or value in (0, 1) else f"{100 * value:.1f}%"


def size(count: float) -> str:
    """
    >>> size(8.1e6), size(23.44e9)
    ('8.1 MB', '23.4 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """
    >>> duration(5.31), duration(231), duration(7400)
    ('5.3 s', '3 min 51 s', '2 h 3 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
