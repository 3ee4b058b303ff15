"""The reward servers of the examples: what they make of detections and answers, with stand-ins for their networks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.rewards import NamedReward
from tiltflow.rewards.functions.prompted import given
from tiltflow.rewards.http import Http
from tiltflow.rewards.serving.server import Served, make_server
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream

FOLDER = Path(__file__).parents[1] / "examples" / "reward_servers"


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The modules, imported as the command does where it is called in their folder."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(FOLDER)
    import geneval  # type: ignore[import-not-found]
    import vlm_judge  # type: ignore[import-not-found]

    yield geneval, vlm_judge
    for name in ("geneval", "vlm_judge"):
        del sys.modules[name]


# ---- objects ----

Servers = tuple[ModuleType, ModuleType]


def of_geneval(a: tuple[float, ...], b: tuple[float, ...]) -> set[str]:
    """Relations as GenEval's own program has them, in its arrays."""
    boxes = np.array([a, b]).reshape(2, 2, 2)
    centre_a, centre_b = boxes.mean(axis=-2)
    size_a, size_b = np.abs(np.diff(boxes, axis=-2))[..., 0, :]
    offset = centre_a - centre_b
    revised = np.maximum(np.abs(offset) - 0.1 * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    which = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in which.items() if holds}


def test_where_things_are(servers: Servers) -> None:
    geneval, _ = servers

    def at(x: float, y: float, size: float = 2) -> Any:
        return geneval.Found((x - size / 2, y - size / 2, x + size / 2, y + size / 2), 0.9)

    assert geneval.relations(at(0, 0), at(10, 0)) == {"left of"}
    assert geneval.relations(at(10, 0), at(0, 0)) == {"right of"}
    assert geneval.relations(at(0, 0), at(0, 10)) == {"above"}  # pixels are counted downwards
    assert geneval.relations(at(10, 10), at(0, 0)) == {"right of", "below"}
    assert geneval.relations(at(0.3, 0), at(0, 0)) == set()  # within a tenth of both sizes
    assert geneval.relations(at(5, 5), at(5, 5)) == set()
    corners = torch.rand(400, 2, 2, 2, generator=stream(0, "boxes")).sort(2).values * 100
    seen = set()
    for pair in corners.flatten(2).tolist():
        found = geneval.relations(*(geneval.Found(tuple(box), 0.9) for box in pair))
        assert found == of_geneval(*map(tuple, pair))
        seen.add(frozenset(found))
    assert len(seen) == 9  # none, four, and four pairs


def box(left: float) -> tuple[float, float, float, float]:
    return (left, 0, left + 10, 10)


def test_scores_by_hand(servers: Servers) -> None:
    geneval, _ = servers
    one, two = geneval.Found(box(0), 0.95), geneval.Found(box(50), 0.8)
    faint, third = geneval.Found(box(90), 0.2), geneval.Found(box(120), 0.92)
    there = {"cat": [two, one, faint], "dog": [third]}
    image = torch.zeros(3, 8, 8)

    def colour(image: Tensor, found: Any, kind: str) -> str:
        return "red" if found.box[0] < 40 else "blue"

    def scores(include: list[dict[str, Any]], exclude: list[dict[str, Any]] | None = None, tag: str = "") -> tuple[float, ...]:
        metadata = {"tag": tag, "include": include, "exclude": exclude or []}
        return tuple(score(image, there, metadata, colour) for score in (geneval.strict_score, geneval.graded_score))

    assert scores([{"class": "cat", "count": 2}]) == (1, 1)
    assert scores([{"class": "cat", "count": 1}]) == (1, 0)  # GenEval leaves what is too much to `exclude`
    assert scores([{"class": "cat", "count": 1}], [{"class": "cat", "count": 2}]) == (0, 0)
    assert scores([{"class": "cat", "count": 4}]) == (0, 0.5)
    assert scores([{"class": "cat", "count": 2}], tag="counting") == (0, 0.5)  # only one is sure enough to be counted
    assert scores([{"class": "bird", "count": 1}]) == (0, 0)
    assert scores([{"class": "dog", "count": 1, "color": "blue"}]) == (1, 1)
    assert scores([{"class": "dog", "count": 1, "color": "red"}]) == (0, 0.5)
    assert scores([{"class": "cat", "count": 2, "color": "red"}]) == (0, 0.75)
    asked = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    assert scores(asked) == (1, pytest.approx(2 / 3))  # one dog, a cat too many, and the cat stands where it should
    asked[1]["position"] = ["right of", 0]
    assert scores(asked) == (0, pytest.approx(1 / 3))
    asked[0] = {"class": "bird", "count": 1}
    assert scores(asked) == (0, 0)  # nothing to stand beside
    # the surest 16 count
    there = {"cat": [geneval.Found(box(i), 0.5 + i / 100) for i in range(30)]}
    assert scores([{"class": "cat", "count": 16}]) == (1, 1)


# ---- answers ----


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7", 0.7),
        ("score 8.5", 0.85),
        ("**Score:** 9/10", 0.9),
        ("8 out of 10", 0.8),
        ("The text names 2 cats, and there are 3. Score: 4", 0.4),
        ("Score: 2. No, the final score is 6", 0.6),
        ("10", 1),
        ("0", 0),
        ("I see 2 cats and 3 dogs", math.nan),
        ("Score: 70", math.nan),
        ("Score: -1", math.nan),
        ("a cat", math.nan),
        ("", math.nan),
    ],
)
def test_an_answer_as_a_score(answer: str, score: float, servers: Servers) -> None:
    assert servers[1].score_in(answer) == pytest.approx(score, nan_ok=True)


# ---- over the wire ----


def reward_of(file: str) -> Any:
    settings: NamedReward = validate(Served, read_yaml(FOLDER / file), file).reward
    return settings.build()


def test_as_a_run_sees_them(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes of the servers, behind the server of tiltflow, asked by the reward `http`."""
    from servers import serving

    geneval, vlm_judge = servers

    def detect(image: Tensor) -> Any:
        return {"cat": [geneval.Found(box(0), 0.9)] if image.mean() > 0 else []}

    monkeypatch.setattr(geneval, "networks", lambda device: (detect, lambda image, found, kind: "red"))
    monkeypatch.setattr(
        vlm_judge,
        "model",
        lambda device: lambda image, question: "Score: 8" if image.mean() > 0 and "'a cat'" in question else "no idea",
    )
    images = torch.tensor([0.5, -0.5]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)
    cat = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    with serving(make_server(reward_of("geneval.yaml"), 0)) as url:
        remote = Http(url=url, retries=0).build()
        assert given(remote, ["a red cat"] * 2, [cat, cat])(images).tolist() == [1, 0]
        with pytest.raises(InputError, match="neither `include` nor `exclude`: is its file one of GenEval's"):
            given(remote, ["a red cat"] * 2, [cat, {}])(images)
    with serving(make_server(reward_of("vlm_judge.yaml"), 0)) as url:
        found = given(Http(url=url, retries=0).build(), ["a cat"] * 2, [{}, {}])(images).tolist()
        assert found == pytest.approx([0.8, math.nan], nan_ok=True)
