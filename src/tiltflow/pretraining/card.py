"""The model card of what was pretrained."""

from __future__ import annotations

from pathlib import Path

import torch

from tiltflow.data import fingerprint
from tiltflow.pretraining.recipe import Pretraining, Scores, Task


def card(recipe: Pretraining, task: Task, name: str, path: Path, scores: Scores, *, seconds: float, device: str) -> str:
    """What was trained, from which data and by which command, and its scores, in Markdown.

    Args:
        name: of the recipe.
        path: of the data.
        seconds: that the training took.
    """
    counts = {part: sum(p.numel() for p in network.parameters()) for part, network in task.networks.items()}
    where = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else device
    steps = {
        stage: f"{each.max_train_steps:,} steps of {each.train_batch_size} images" for stage, each in recipe.schedules.items()
    }
    told = ", ".join(text if len(steps) == 1 else f"{stage} {text}" for stage, text in steps.items())
    precision = " and ".join(dict.fromkeys(f"'{each.mixed_precision}'" for each in recipe.schedules.values()))
    lines = [
        f"# {name}",
        "",
        f"{recipe.description[:1].upper()}{recipe.description[1:]}.",
        "",
        f"- data: `{path.name}` (sha256 {fingerprint(path)}..), {task.data()}",
        f"- command: `tiltflow pretrain {name} --data {path.name} --output {name}`, seed {recipe.seed}",
        f"- training: {told}, {seconds / 60:.0f} minutes on {where}, mixed precision {precision}, torch {torch.__version__}",
        f"- network: {'; '.join(f'{part}, {count:,} parameters' for part, count in counts.items())}",
        "",
        "| score | value |",
        "|---|---|",
        *(f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |" for key, value in scores.items()),
        "",
        *(line for remark in task.remarks() for line in (remark, "")),
    ]
    return "\n".join(lines)
