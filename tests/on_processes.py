"""What `test_processes.py` starts in several processes, or in one: python on_processes.py FOLDER SCENARIO [SCENARIO ..]"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import torch
from test_resume import METHODS, recipe_for, resuming
from test_run_text_to_image import recipe_for as picture_recipe
from torch import Tensor

from tiltflow import processes
from tiltflow.errors import NonFiniteError
from tiltflow.run import run
from tiltflow.run_text_to_image import TextToImageRecipe, run_text_to_image
from tiltflow.settings import validate


def methods(folder: Path) -> None:
    """A short run by each method, evaluation and all."""
    for method in METHODS:
        run(recipe_for(own(folder) / method, method), folder / method)


def pictures(folder: Path) -> None:
    """Pipelines with an adapter and in full, guidance, and a reward that is normalised for each prompt."""
    for name, method, adapter in (
        ("stable-diffusion", "adjoint-matching", {"rank": 2}),
        ("stable-diffusion-3", "orw-cfm-w2", None),
        ("stable-diffusion", "score-as-action", {"rank": 2}),
    ):
        tree = picture_recipe(own(folder), name, method)
        tree["model"]["adapter"] = adapter
        # 6 samples a step, and 3 in a network at once: shares that do not divide are done twice in part, but counted once
        tree["training"] |= {"num_generations": 3, "micro_batch_size": 3, "per_prompt_normalization": 5, "ema_decay": 0.5}
        tree["training"]["monitor"] = {"steps": 2}
        tree["method"]["learning_rate"] = 1e-3
        kind = "full" if adapter is None else "adapter"
        run_text_to_image(validate(TextToImageRecipe, tree, "recipe"), folder / f"{name}-{method}-{kind}")


def go_on(folder: Path) -> None:
    """Go on with a run from its third step."""
    for method in ("adjoint-matching", "score-as-action"):
        run(resuming(recipe_for(own(folder) / method, method), "step-00000004"), folder / method)


def keep_all(folder: Path) -> None:
    """Runs whose checkpoints are all kept."""
    for method in ("adjoint-matching", "score-as-action"):
        recipe = recipe_for(own(folder) / method, method, checkpoints_total_limit=None, checkpointing_steps=2)
        run(recipe, folder / method)


def not_finite(folder: Path) -> None:
    """A reward that is NaN for one sample of the second process, from the third iteration on."""
    for method, policy in (("adjoint-matching", "error"), ("adjoint-matching", "drop"), ("score-as-action", "drop")):
        calls = 0

        def reward(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            values = x.flatten(1).sum(1)
            return values.index_fill(0, torch.tensor([0]), math.nan) if calls == 3 and processes.index() == 1 else values

        recipe = recipe_for(own(folder) / method, method, non_finite_rewards=policy)
        import tiltflow.run

        before, tiltflow.run.build_reward = tiltflow.run.build_reward, lambda *arguments: reward
        check, tiltflow.run.check_fit = tiltflow.run.check_fit, lambda *arguments: None
        try:
            run(recipe, folder / f"{method}-{policy}")
        except NonFiniteError as error:
            (folder / f"said-by-{processes.index()}").write_text(f"{error} {error.where}")
        tiltflow.run.build_reward, tiltflow.run.check_fit = before, check


def dies(folder: Path) -> None:
    """The second process fails in the middle of training; the first one would wait for it for ever."""
    began = 0

    def watch() -> None:
        nonlocal began
        began += 1
        if began == 20 and processes.index() == 1:
            raise ZeroDivisionError("the reward of process 1 divides by zero")

    import tiltflow.run

    build = tiltflow.run.build_reward

    def built(*arguments: object) -> object:
        reward = build(*arguments)

        def told(x: Tensor) -> Tensor:
            watch()
            return reward(x)

        return told

    tiltflow.run.build_reward = built
    run(recipe_for(own(folder), "adjoint-matching", max_train_steps=10_000), folder / "run")


def signalled(folder: Path) -> None:
    """A run without end; the test sends a signal to the second process alone."""
    (folder / f"process-{processes.index()}").write_text(str(os.getpid()))
    from tiltflow.errors import Interrupted

    try:
        run(recipe_for(own(folder), "adjoint-matching", max_train_steps=100_000), folder / "run", handle_signals=True)
    except Interrupted as error:
        (folder / f"left-{processes.index()}").write_text(f"{error.signal} {time.monotonic()}")


def own(folder: Path) -> Path:
    """Where this process puts what the recipes name."""
    folder = folder / f"of-process-{processes.index()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    folder, *scenarios = sys.argv[1:]
    torch.set_num_threads(1)
    processes.begin("cpu")
    for scenario in scenarios:
        place = Path(folder) / scenario
        place.mkdir(parents=True, exist_ok=True)
        processes.wait()
        globals()[scenario](place)
    processes.end()


if __name__ == "__main__":
    main()
