"""The model card of what was pretrained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tiltflow.data import fingerprint
from tiltflow.errors import InputError
from tiltflow.pretraining.recipe import Pretraining, Scores, Task

TABLE = ("| score | value |", "|---|---|")


def card(
    recipe: Pretraining,
    task: Task,
    name: str,
    path: Path,
    scores: Scores,
    *,
    steps: Mapping[str, int],
    seconds: float,
    device: str,
    stopped: bool = False,
) -> str:
    """What was trained, from which data and by which command, and its scores, in Markdown.

    Args:
        name: of the recipe.
        path: of the data.
        steps: that each stage took.
        seconds: that the training took.
        stopped: whether a signal ended it early.
    """
    counts = {part: sum(p.numel() for p in network.parameters()) for part, network in task.networks.items()}
    where = f"{seconds / 60:.0f} minutes on {f'{torch.get_num_threads()} CPU threads' if device == 'cpu' else device}"
    drawn = {stage: f"{steps[stage]:,} steps of {each.train_batch_size} samples" for stage, each in recipe.schedules.items()}
    told = ", ".join(text if len(drawn) == 1 else f"{stage} {text}" for stage, text in drawn.items())
    early = ", stopped early" if stopped else ""
    precision = " and ".join(dict.fromkeys(f"'{each.mixed_precision}'" for each in recipe.schedules.values()))
    lines = [
        f"# {name}",
        "",
        f"{recipe.description[:1].upper()}{recipe.description[1:]}.",
        "",
        f"- data: `{path.name}` (sha256 {fingerprint(path)}..), {task.data()}",
        f"- command: `tiltflow pretrain {name} --data {path.name} --output {name}`, seed {recipe.seed}",
        f"- training: {told}{early}, {where}, mixed precision {precision}, torch {torch.__version__}",
        f"- network: {'; '.join(f'{part}, {count:,} parameters' for part, count in counts.items())}",
        "",
        *TABLE,
        *rows(scores),
        "",
        *(line for remark in task.remarks() for line in (remark, "")),
    ]
    return "\n".join(lines)


def rows(scores: Scores) -> list[str]:
    """Rows of the table of scores."""
    return [f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |" for key, value in scores.items()]


def with_scores(text: str, scores: Scores, where: str) -> str:
    """A card with other scores in the place of those of the same names, and after the rest of its table. Raises InputError for
    a text that is no card."""
    lines = text.split("\n")
    if not set(TABLE) <= set(lines):
        raise InputError(f"{where}: is no card of `tiltflow pretrain`: it has no table of scores")
    begin = lines.index(TABLE[1]) + 1
    end = next(i for i, line in enumerate([*lines, ""]) if i >= begin and not line.startswith("|"))
    kept = [line for line in lines[begin:end] if line.removeprefix("| ").split(" | ")[0] not in scores]
    return "\n".join([*lines[:begin], *kept, *rows(scores), *lines[end:]])
