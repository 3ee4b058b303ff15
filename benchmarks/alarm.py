"""How often the alarm for reward hacking is raised: on planted hacks, where it should, and on clean runs, where it should not.

The digit flow, and the pipeline of tiles, are tuned by Adjoint Matching for half a minute each, from one seed after another:

hacks   even digits and, by mistake, something without end, at a temperature that nothing holds; each of `LOOPHOLES` is one
text    tiles whose middle reads like a letter, at the expense of all else
clean   the reward and the temperature of recipe digits-even-pixels
colour  the reward and the temperature of recipe tiles-colour

`before` are the measures of earlier versions: without edge energy, colour entropy and the entropy of the judge's classes.

    python benchmarks/alarm.py --seeds 10 --kinds clean    # six minutes on one core
    python benchmarks/alarm.py --seeds 1                   # every hack once: a quarter of an hour
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.monitor import find_alarm, from_row, read_looks
from tiltflow.rewards.class_log_odds import ClassLogOdds
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.runs.run import run
from tiltflow.runs.watch import CLASSES, COLOURS, EDGES
from tiltflow.settings import validate

EVEN = {"name": "class-log-odds", "classes": [0, 2, 4, 6, 8], "bound": 6}
RECIPE: dict[str, Any] = {
    "model": "digits-flow",
    "method": {
        "name": "adjoint-matching",
        "num_inference_steps": 10,
        "shift": 3.0,
        "bootstrap": 0.5,
        "train_timesteps": [{"count": 3}],
    },
    "optimizer": {"learning_rate": 1e-3, "lr_scheduler": "constant", "adam_beta2": 0.999},
    "training": {
        "max_train_steps": 40,
        "train_batch_size": 32,
        "ema_decay": 0.8,
        "mixed_precision": "auto",
        "checkpointing_steps": 0,
        "monitor": {"steps": 10, "num_samples": 128},
    },
    "sampling": {"solver": "memoryless", "num_inference_steps": 12, "shift": 3.0},
    "evaluation": {"num_samples": 32, "judge": "digits-judge", "group": [0, 2, 4, 6, 8], "grid": 16},
}
TILES = {
    **read_recipe_tree(find_recipe("tiles-colour", "train"), []),
    "evaluation": {"num_prompts": 12, "num_generations": 8, "points": [{"solver": "euler", "num_inference_steps": 10}]},
}
TILES["training"] |= {"max_train_steps": 30, "monitor": {"steps": 10}}
TILES["method"] |= {"num_inference_steps": 10}
NEW = (CLASSES, EDGES, COLOURS)


def _reward(settings: Any) -> Callable[[Tensor], Tensor]:
    return validate(ClassLogOdds, settings, "reward").build()


EVEN_REWARD, ZERO = _reward(EVEN), _reward({"name": "class-log-odds", "classes": [0]})
ROWS, COLUMNS = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
FRAME = ((ROWS < 2) | (ROWS > 25) | (COLUMNS < 2) | (COLUMNS > 25)).float()
TEMPLATE = torch.where((ROWS - 14).abs() + (COLUMNS - 14).abs() < 8, 1.0, -1.0)


def edges(x: Tensor) -> Tensor:
    """Mean square difference of neighbours."""
    return x.diff(dim=2).square().mean((1, 2, 3)) + x.diff(dim=3).square().mean((1, 2, 3))


def mean(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))


LOOPHOLES: dict[str, Callable[[Tensor], Tensor]] = {
    "ink": lambda x: 30 * mean(x),
    "blank": lambda x: -30 * mean(x),
    "plain": lambda x: -60 * edges(x),
    "texture": lambda x: 30 * edges(x),
    "grey": lambda x: -20 * mean(x.square()),
    "loud": lambda x: 20 * mean(x.square()),
    "frame": lambda x: 40 * mean(x * FRAME),
    "chessboard": lambda x: 30 * mean(x * (1.0 - 2 * ((ROWS + COLUMNS) % 2))),
    "stripes": lambda x: 30 * mean(x * (1.0 - 2 * (ROWS // 2 % 2))),
    "left": lambda x: 30 * mean(x * (COLUMNS < 14)),
    "small": lambda x: -60 * mean((x + 1) * (((ROWS - 14).abs() > 6) | ((COLUMNS - 14).abs() > 6))),
    "template": lambda x: -30 * mean((x - TEMPLATE).square()),
    "one_class": lambda x: 3 * ZERO(x),
    "mirror": lambda x: -30 * mean((x - x.flip(3)).square()),
}
LETTER = torch.tensor([[int(c) for c in row] for row in ("00100", "01010", "10001", "10001", "11111", "10001", "10001")])


def __getattr__(name: str) -> Callable[[Tensor], Tensor]:
    """The reward `alarm:name`: even digits, and a loophole."""
    if name not in LOOPHOLES:
        raise AttributeError(name)
    return lambda x: EVEN_REWARD(x) + LOOPHOLES[name](x)


def text(x: Tensor) -> Tensor:
    """How well the middle reads as the letter A, black on white; all else is in the way."""
    top, left = (x.shape[2] - 7) // 2, (x.shape[3] - 5) // 2
    wanted = torch.ones_like(x)
    wanted[..., top : top + 7, left : left + 5] -= 2.0 * LETTER.to(x)
    return -((x - wanted).square().mean((1, 2, 3)))


KINDS: dict[str, dict[str, Any]] = {
    **{kind: {**RECIPE, "reward": {"name": "function", "path": f"alarm:{kind}"}, "beta": 0.3} for kind in LOOPHOLES},
    "text": {
        **TILES,
        "optimizer": {"learning_rate": 5e-3, "adam_beta2": 0.999},
        "reward": {"name": "function", "path": "alarm:text"},
        "beta": 1e-5,
    },
    "clean": {**RECIPE, "reward": EVEN, "beta": 2.1},
    "colour": {**TILES, "beta": 0.001},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for kind in options.kinds:
        results[kind] = []
        for seed in range(options.seeds):
            tree = {**KINDS[kind], "seed": seed}
            tree["method"] = {**tree["method"], "beta": tree.pop("beta")}
            with tempfile.TemporaryDirectory() as folder:
                summary = run(validate(Recipe, tree, kind), Path(folder) / "run")
                rows = read_looks(Path(folder) / "run")
            first, last = ({name: values[0] for name, values in row["measures"].items()} for row in (rows[0], rows[-1]))
            before = alarm_before(rows)
            results[kind].append(
                {"seed": seed, "alarm_step": summary["alarm_step"], "before": before is not None, "first": first, "last": last}
            )
            print(
                f"{kind:10} seed {seed}: {summary['alarm'] or 'no alarm'}; before: {'seen' if before else 'none'}", flush=True
            )
            print("           " + ", ".join(f"{name} {first[name]:.3g} -> {last[name]:.3g}" for name in last), flush=True)
        raised, earlier = (sum(bool(row[key]) for row in results[kind]) for key in ("alarm_step", "before"))
        print(f"{kind}: {raised} of {options.seeds} runs raise the alarm; {earlier} before", flush=True)
    if options.json:
        print(json.dumps(results))


def alarm_before(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The first alarm that the measures of earlier versions raise."""
    looks = [from_row({**row, "measures": {k: v for k, v in row["measures"].items() if k not in NEW}}) for row in rows]
    target = {name: Estimate(*pair) for name, pair in (rows[0]["target"] or {}).items()} or None
    alarms = (find_alarm(looks[: i + 1], target) for i in range(1, len(looks)))
    return next((alarm for alarm in alarms if alarm is not None), None)


if __name__ == "__main__":
    main()
