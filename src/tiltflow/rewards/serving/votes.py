"""Votes of people: a folder with pairs of pictures of the same prompt, and which of the two was chosen."""

# Mutation tests: test_votes.py

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiltflow.data import Pairs, to_pixels
from tiltflow.errors import InputError
from tiltflow.files import read_json, read_rows, trusted, write_folder, write_json, write_rows
from tiltflow.rewards.functions.bradley_terry import share_interval
from tiltflow.streams import stream
from tiltflow.user_code import refused

PAIRS, VOTES = "pairs.json", "votes.jsonl"
Choice = Literal["first", "second", "tie"]
CHOICES: tuple[str, ...] = get_args(Choice)
MOST_PIXELS = 1 << 26  # of a picture


@dataclass
class Votes:
    """A folder of votes. Each change is written before it counts, so that it is there after a crash; pairs are voted on in
    order.

    Args:
        names: what the pictures of a pair are, such as `after` and `before`: nobody who votes sees it.
        prompts: of the pairs.
        metadata: of the prompts.
        seed: decides which picture of a pair is shown on the left.
        choices: the votes so far, of the first pairs.
    """

    folder: Path
    names: tuple[str, str]
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    seed: int
    choices: list[Choice] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        folder: Path,
        names: tuple[str, str],
        prompts: Sequence[str],
        metadata: Sequence[Any],
        both: Sequence[Tensor],
        seed: int,
    ) -> Votes:
        """Write a new folder with the pictures [pairs, 1 or 3, height, width] of both sides, all at once."""

        def write(draft: Path) -> None:
            for side, images in enumerate(both):
                for i, pixels in enumerate(to_pixels(images).permute(0, 2, 3, 1).numpy()):
                    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
                        draft / picture_name(i, side), "PNG"
                    )
            write_json(draft / PAIRS, {"names": names, "prompts": prompts, "metadata": metadata, "seed": seed})

        write_folder(folder, write)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Votes:
        """Read a folder, to go on. Raises InputError if it is none, or if its files cannot be read."""
        if not (folder / PAIRS).is_file():
            raise InputError(f"{folder}: has no votes; `tiltflow vote RUN --output {folder}` asks for some")
        tree = read_json(folder / PAIRS)
        with trusted(folder / PAIRS, "nothing writes it again; `tiltflow vote` with a new --output asks anew"):
            first, second = map(str, tree["names"])
            prompts, metadata, seed = (
                [str(text) for text in tree["prompts"]],
                [dict(one) for one in tree["metadata"]],
                tree["seed"],
            )
            if len(prompts) != len(metadata) or not prompts or not isinstance(seed, int):
                raise ValueError("not pairs")
        rows, damaged = read_rows(folder / VOTES, check_row)
        if damaged or len(rows) > len(prompts) or [row["step"] for row in rows] != list(range(len(rows))):
            raise InputError(f"{folder / VOTES}: is damaged: it must have a line for each of the first pairs, in their order")
        return cls(folder, (first, second), prompts, metadata, seed, [row["choice"] for row in rows])

    def __len__(self) -> int:
        return len(self.prompts)

    def first_is_left(self, pair: int) -> bool:
        """Whether the first picture of this pair is shown on the left: by chance, and always the same."""
        return bool(torch.randint(2, (), generator=stream(self.seed, "side", pair)))

    def vote(self, choice: Choice) -> None:
        """Choose in the next pair."""
        self._write([*self.choices, choice])

    def undo(self) -> None:
        """Take the last vote back, if there is one."""
        self._write(self.choices[:-1])

    def _write(self, choices: list[Choice]) -> None:
        write_rows(
            self.folder / VOTES,
            [{"step": i, "choice": each, "prompt": self.prompts[i]} for i, each in enumerate(choices)],
        )
        self.choices = choices

    def picture(self, pair: int, side: int) -> Path:
        """The file of a picture: side 0 is the first."""
        return self.folder / picture_name(pair, side)

    def pictures(self, side: int) -> Tensor:
        """The pictures [votes, channels, height, width] in [-1, 1] of the pairs that were voted on. Raises InputError if one
        cannot be read."""
        return torch.stack([read_picture(self.picture(i, side)) for i in range(len(self.choices))])

    def share(self) -> tuple[float, float, float]:
        """The share of the votes that chose the first picture, a tie being half a vote for either, and Wilson's interval of
        95 %, which ties make wider than it need be. Of at least one vote."""
        first, count = self.outcomes().sum().item(), len(self.choices)
        return first / count, *share_interval(first, count)

    @property
    def words(self) -> str:
        """How often each of the two was chosen."""
        first, second, tie = (sum(each == choice for each in self.choices) for choice in CHOICES)
        counted = f"{self.names[0]} {first}, {self.names[1]} {second}, equal {tie}"
        if not self.choices:
            return counted
        share, low, high = self.share()
        return f"{counted}: {self.names[0]} is chosen in {share:.0%} (95% interval {low:.0%} to {high:.0%})"

    def decided(self) -> Pairs:
        """The pairs of which one picture was chosen, as Diffusion-DPO learns from them; ties are left out. Raises InputError if
        there is none, or if a picture cannot be read."""
        decided = [i for i, choice in enumerate(self.choices) if choice != "tie"]
        if not decided:
            raise InputError(f"{self.folder}: nobody has chosen one of two pictures yet")
        first, second = (self.pictures(side)[decided] for side in range(2))
        won = torch.tensor([self.choices[i] == "first" for i in decided])[:, None, None, None]
        prompts = [self.prompts[i] for i in decided]
        return Pairs(torch.where(won, first, second), torch.where(won, second, first), prompts if any(prompts) else None)

    def outcomes(self) -> Tensor:
        """1 where the first picture was chosen, 0 where the second was, and 1/2 for a tie, float64 [votes]."""
        return torch.tensor([{"first": 1.0, "second": 0.0, "tie": 0.5}[each] for each in self.choices], dtype=torch.float64)


def picture_name(pair: int, side: int) -> str:
    return f"{pair:05d}-{side + 1}.png"


def read_picture(path: Path) -> Tensor:
    """[channels, height, width] in [-1, 1]. Raises InputError if it cannot be read."""
    with refused(f"{path}: cannot be read"), Image.open(path, formats=["PNG"]) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError("it is too large")
        pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 127.5 - 1


def check_row(row: Any) -> None:
    """Raise an exception if this is not a vote."""
    if row["choice"] not in CHOICES:
        raise ValueError("not a vote")
