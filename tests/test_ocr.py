"""Reward `ocr`: edits against their definition, and text that is drawn against what is read of it."""

from __future__ import annotations

import builtins
import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.rewards.functions.prompted import given
from tiltflow.rewards.ocr import Ocr, edits, legibility, text_of


@cache
def by_definition(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    change = by_definition(one[1:], other[1:]) + (one[0] != other[0])
    return min(change, by_definition(one[1:], other) + 1, by_definition(one, other[1:]) + 1)


def test_edits_are_the_fewest() -> None:
    words = ["".join(letters) for n in range(5) for letters in itertools.product("ab", repeat=n)]
    for one, other in itertools.product(words, words):
        assert edits(one, other) == by_definition(one, other)


@pytest.mark.parametrize(
    ("wanted", "read", "anywhere", "strict"),
    [
        ("Hello", "hello", 1, 1),
        ("Hello World", "HELLOWORLD", 1, 1),
        ("Hello", "say hello twice", 1, 0),  # 8 letters too many
        ("Hello", "hellooo", 1, 0.6),
        ("Hello", "hxllo", 0.8, 0.8),
        ("Hello", "", 0, 0),
        ("Go", "something else", 0, 0),  # never below 0
        ("STRASSE", "straße", 1, 1),
    ],
)
def test_legibility_by_hand(wanted: str, read: str, anywhere: float, strict: float) -> None:
    assert legibility(wanted, read) == pytest.approx(anywhere)
    assert legibility(wanted, read, anywhere=False) == pytest.approx(strict)


def test_the_text_that_a_prompt_asks_for() -> None:
    assert text_of('a "red" and a "blue" sign', {}) == "red"
    assert text_of("ein Schild, auf dem “Offen” steht", {}) == "Offen"
    assert text_of('a "red" sign', {"text": "from its file"}) == "from its file"
    for prompt, metadata in (("a cat", {}), ('a "  " sign', {}), ('a "sign"', {"text": ""}), ("a", {"text": 3})):
        with pytest.raises(InputError, match="asks for no text: put it in quotation marks"):
            text_of(prompt, metadata)


def test_one_line_where_the_engine_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name == "rapidocr":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"^reward ocr: rapidocr is not installed: pip install '\.\[ocr\]'"):
        Ocr().build()


def drawn(text: str, *, grey: bool = False) -> Tensor:
    picture = Image.new("RGB", (256, 128), "white")
    ImageDraw.Draw(picture).text((12, 40), text, fill="black", font=ImageFont.load_default(36))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels[:1] if grey else pixels


def test_drawn_text_is_read() -> None:
    pytest.importorskip("rapidocr", reason="needs the extra ocr")
    reward = Ocr().build()
    pictures = torch.stack([drawn("Hello"), drawn("Open 24h"), drawn(""), drawn("Cold")])
    prompts = ['a "Hello" sign', 'the words "open 24H"', 'a wall that says "nothing"', "a sign"]
    found = given(reward, prompts, [{}, {}, {}, {"text": "Gold"}])(pictures)
    assert found.tolist() == pytest.approx([1, 1, 0, 0.75])
    assert given(reward, ["a sign"], [{"text": "Hello"}])(drawn("Hello", grey=True)[None]).tolist() == [1]
    assert given(reward, ["a sign"], [{"text": "Hello"}])(torch.full((1, 3, 8, 8), 7.0)).tolist() == [0]
