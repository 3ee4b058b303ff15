"""Text in a picture: how near what can be read there is to the text that its prompt asks for."""

# Mutation tests: test_ocr.py

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tiltflow.data import to_pixels
from tiltflow.errors import InputError, not_installed
from tiltflow.rewards import Metadata, Reward
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import Settings

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class Ocr(Settings):
    """1 - (edits from the text that is read to the text that is asked for) / (length of the latter), at least 0: the reward of
    Flow-GRPO (2505.05470), by RapidOCR, whose networks come in its package. Case and spaces do not count. The text is that of
    the key `text` of the prompt's metadata, or what the prompt has in quotation marks."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "share of the text"

    name: Literal["ocr"] = "ocr"
    anywhere: bool = True
    """True: 1 if the text is anywhere in what is read, as in Flow-GRPO. False: all else that is read counts as an error."""

    @property
    def description(self) -> str:
        return "how near the text that can be read in a picture is to the one asked for, 0 to 1"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if RapidOCR is not installed."""
        read = reader()

        def ocr(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
            wanted = [text_of(prompt, more) for prompt, more in zip(prompts, metadata, strict=True)]
            values = [legibility(text, read(image), anywhere=self.anywhere) for text, image in zip(wanted, images, strict=True)]
            return torch.tensor(values, device=images.device)

        return OfPrompts(of_frames(ocr), ("prompts", "metadata"))


def reader() -> Callable[[Tensor], str]:
    """Reads the text of a picture [1 or 3, height, width] in [-1, 1], line after line. Raises InputError if RapidOCR is not
    installed."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise not_installed("reward ocr: rapidocr", "ocr") from None
    engine: Any = RapidOCR(params={"Global.log_level": "critical"})

    def read(image: Tensor) -> str:
        pixels = to_pixels(image).expand(3, -1, -1).permute(1, 2, 0).flip(2)  # blue first
        return " ".join(engine(pixels.contiguous().numpy()).txts or ())

    return read


def text_of(prompt: str, metadata: Metadata) -> str:
    """The text that a picture is to show. Raises InputError if there is none.

    >>> text_of('A shop sign that says "Open late"', {}), text_of("a sign", {"text": "Closed"})
    ('Open late', 'Closed')
    """
    found = QUOTED.search(prompt)
    text = metadata.get("text", (found[1] or found[2] or "") if found else "")
    if not isinstance(text, str) or not plain(text):
        raise InputError(
            f"reward ocr: the prompt {prompt[:80]!r} asks for no text: put it in quotation marks, or under `text` in its file"
        )
    return text


def legibility(wanted: str, read: str, *, anywhere: bool = True) -> float:
    """1 - edits / length of the text that is wanted, at least 0.

    >>> legibility("Open late", "OPEN LATF"), legibility("Open", "We are open"), legibility("Open", "")
    (0.875, 1.0, 0.0)
    """
    wanted, read = plain(wanted), plain(read)
    if anywhere and wanted in read:
        return 1.0
    return max(0.0, 1 - edits(wanted, read) / len(wanted))


def plain(text: str) -> str:
    """The text without case and spaces."""
    return "".join(text.casefold().split())


def edits(one: str, other: str) -> int:
    """The least number of insertions, deletions and changes of a character that make one text of the other (Levenshtein).

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(before + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]
