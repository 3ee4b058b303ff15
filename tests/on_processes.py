"""What `test_processes.py` lets several processes do."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from test_resume import METHODS, recipe_for, resuming
from torch import Tensor

from tiltflow import processes
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.flows.field import FunctionField, Which
from tiltflow.flows.flow import Flow
from tiltflow.flows.guided import Guided
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.networks.mlp import Mlp
from tiltflow.runs.checkpoint import FOLDER, checkpoints
from tiltflow.runs.lock import LOCK
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.samplers.stored import Storage, Stored
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import new_network, normal, stream
from tiltflow.training.batch import Batch

WEIGHTS: dict[str, dict[str, str]] = {
    "replicated": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResidualBlock"},
    "zero-2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
}
"""How accelerate would be configured, by where the weights are; read again for each network."""

INTERRUPTED = ("adjoint-matching", "score-as-action")
STATELESS = {
    "deterministic-adjoint-matching": {"name": "deterministic-adjoint-matching", "beta": 0.1, "num_inference_steps": 4},
    "vgg-flow-first-order": {"name": "vgg-flow", "value_network": False, "beta": 0.1, "num_inference_steps": 4},
    "draft": {"name": "draft", "truncation": "random", "solver": "memoryless", "num_inference_steps": 4},
    "draft-lv": {"name": "draft", "num_renoisings": 2, "num_inference_steps": 4},
    "ram": {"name": "ram", "num_inference_steps": 4, "num_passes": 2},
    "awm": {"name": "awm", "num_inference_steps": 4},
    "adrpo": {"name": "adrpo", "num_inference_steps": 4, "neighbours": 3},
    "raft": {"name": "raft", "num_inference_steps": 4, "n": 2, "num_passes": 1},
    "diffusion-dpo": {"name": "diffusion-dpo", "num_inference_steps": 4, "num_draws": 3, "num_passes": 2},
    "ddpo": {"name": "ddpo", "num_inference_steps": 4, "clip_range": 0.2},
    "dpok": {"name": "dpok", "num_inference_steps": 4, "num_passes": 2, "kl_gradient": "whole"},
    "flow-grpo": {"name": "flow-grpo", "num_inference_steps": 4, "sde_window_size": 2, "beta": 1.0, "advantages": "centered"},
    "refl": {"name": "refl", "num_inference_steps": 4, "earliest": 0.0},
}
"""Methods without a state, or with hardly one, which `test_resume.py` leaves out."""
OTHERS = (*(method for method in METHODS if method not in INTERRUPTED), *STATELESS)


def methods(folder: Path) -> None:
    """A short run of several batches by each method that is not `INTERRUPTED`, evaluation and all."""
    for method in OTHERS:
        with counted(folder / f"{method}-stored-by-{processes.index()}"):
            run(shared_recipe(folder, method, max_train_steps=6), folder / method)
    taken(folder, shared_recipe(folder, method))


@contextmanager
def counted(path: Path) -> Iterator[None]:
    """Writes down of how many samples trajectories are stored here."""
    new, sizes = Storage.new, set[int]()

    def watched(self: Storage, steps: int, like: Tensor) -> Stored:
        sizes.add(len(like))
        return new(self, steps, like)

    Storage.new = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        Storage.new = new  # type: ignore[method-assign]
    path.write_text(" ".join(str(size) for size in sorted(sizes)))


def taken(folder: Path, recipe: Recipe) -> None:
    """What each process says of a folder that is occupied, one that is worked in, and one that cannot be."""
    said = []
    lock = FileLock(folder / "locked" / LOCK)
    if processes.is_main():
        (folder / "locked").mkdir()
        lock.acquire()
        (folder / "file").touch()
    processes.wait()
    for name in (recipe.method.name, "locked", "file"):
        try:
            run(recipe, folder / name)
        except InputError as error:
            said.append(str(error).removeprefix(str(folder)))
    (folder / f"said-by-{processes.index()}").write_text("\n".join(said))
    processes.wait()
    lock.release()


def pictures(folder: Path) -> None:
    """Pipelines with an adapter and in full, guidance, and a reward that is normalised for each prompt."""
    from test_run_text_to_image import recipe_for as picture_recipe  # slow to import

    import tiltflow.runs.evaluate

    before, tiltflow.runs.evaluate.PATHS_OF_PROMPTS = tiltflow.runs.evaluate.PATHS_OF_PROMPTS, 3  # most of the time, else
    for name, method, adapter in (
        ("stable-diffusion", "adjoint-matching", {"rank": 2}),
        ("stable-diffusion-3", "orw-cfm-w2", None),
        ("stable-diffusion", "score-as-action", {"rank": 2}),
    ):
        processes.by_main(lambda name=name: picture_recipe(folder, name))  # transformers writes in the first process alone
        tree = picture_recipe(folder, name, method)
        tree["model"]["adapter"] = adapter
        # 5 samples for two processes: one is done twice, and must be counted once
        tree["training"] |= {
            "prompts_per_step": 1,
            "num_generations": 5,
            "micro_batch_size": None,
            "per_prompt_normalization": 4,
            "ema_decay": 0.5,
        }
        tree["training"]["monitor"] = {"steps": 2}
        tree["optimizer"]["learning_rate"] = 1e-4
        if method != "orw-cfm-w2":
            tree["method"]["train_timesteps"] = [{"count": 1}]  # else the pairs of step and sample are even
        if tree["method"].pop("preset", None):
            tree["method"] |= {"num_passes": 2, "critic": {"num_steps": 1}}
            # the rewards of pictures of noise are hardly different: in units of that, the critic would learn from rounding
            tree["training"]["per_prompt_normalization"] = None
        kind = "full" if adapter is None else "adapter"
        run(validate(Recipe, tree, "recipe"), folder / f"{name}-{method}-{kind}")
    tiltflow.runs.evaluate.PATHS_OF_PROMPTS = before


def interrupted(folder: Path) -> None:
    """Runs with a KL budget, and copies of them that go on from their second checkpoint."""
    for method in INTERRUPTED:
        recipe = shared_recipe(
            folder, method, max_train_steps=9, checkpoints_total_limit=None, checkpointing_steps=2, target_kl=0.2
        )
        run(recipe, folder / method)
        copy = folder / f"{method}-again"
        processes.by_main(lambda method=method, copy=copy: shutil.copytree(folder / method, copy) and None)
        processes.by_main(lambda copy=copy: shutil.rmtree(copy / "model"))
        run(resuming(recipe, checkpoints(copy / FOLDER)[1].name), copy)


def not_finite(folder: Path) -> None:
    """A reward that is NaN for one sample of the second process, from the third iteration on."""
    for method, policy in (("adjoint-matching", "error"), ("adjoint-matching", "drop"), ("score-as-action", "drop")):
        calls = 0

        def reward(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            values = x.flatten(1).sum(1)
            return values.index_fill(0, torch.tensor([0]), math.nan) if calls == 3 and processes.index() == 1 else values

        recipe = shared_recipe(folder, method, non_finite_rewards=policy)
        import tiltflow.runs.run

        before, tiltflow.runs.run.build_reward = tiltflow.runs.run.build_reward, lambda *arguments, **options: reward
        check, tiltflow.runs.run.rehearse = tiltflow.runs.run.rehearse, lambda *arguments, **options: None
        try:
            run(recipe, folder / f"{method}-{policy}")
        except NonFiniteError as error:
            (folder / f"said-by-{processes.index()}").write_text(f"{error} {error.where}")
        tiltflow.runs.run.build_reward, tiltflow.runs.run.rehearse = before, check


CRITICS: dict[str, dict[str, Any]] = {
    "minibatches": {"critic": {"form": "cos-sin", "loss": "td-lambda", "train_batch_size": 2, "num_steps": 2}},
    "orthogonality": {"estimator": "temporal-difference", "critic": {"loss": "orthogonality", "train_batch_size": 2}},
    "closed-form": {"solver": "heun", "critic": {"form": "linear", "loss": "td", "num_steps": 2}},
    "pathwise": {"estimator": "pathwise", "solver": "ddpm", "num_passes": 1},
    "clip": {"update": "clip", "train_timesteps": [{"count": 1}], "critic": {"form": "constant-skip", "num_steps": 2}},
}
"""Settings of Score as Action."""


@dataclass(frozen=True)
class Partial:
    """A reward that is bound to samples, and of some of them NaN."""

    bad: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.bad, math.nan, x.sum(1) - x.square().sum(1))

    def select(self, which: Which) -> Partial:
        return Partial(self.bad[which])


def critics(folder: Path) -> None:
    """What Score as Action learns by its settings from 5 samples, which two processes cannot share evenly; in its second
    iteration one is left out. In double precision, with guidance in sampling alone and a running reward."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for name, settings in CRITICS.items():
        with counted(folder / f"{name}-stored-by-{processes.index()}"):
            torch.save(learned(settings), folder / f"{name}-by-{processes.index()}.pt")
    torch.set_default_dtype(before)


def learned(settings: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of the policy and of the critic, and the metrics of each step."""
    method = ScoreAsAction.model_validate({"num_inference_steps": 4, "beta": 0.5} | settings)
    network, fixed = (new_network(Mlp(hidden=8, layers=1), seed) for seed in range(2))
    state, generator = method.new_state((2,), 0, torch.device("cpu")), stream(0, "noise")
    negative, optimizer = FunctionField(lambda x, t: -x), torch.optim.SGD(network.parameters(), 0.02)
    found: dict[str, Tensor] = {}
    for left_out in (5, 3):
        batch = Batch(
            normal((5, 2), generator, torch.float64),
            Flow(network),
            Flow(fixed),
            Partial(torch.arange(5) == left_out),
            generator,
            guide=lambda flow: Guided(flow, negative, 1.5),
            micro_batch_size=2,
            non_finite="drop",
            running=lambda x, t: t * x.sin().sum(1),
        )
        for metrics in method.gradients(batch, state):
            processes.sum_gradients(network.parameters())
            optimizer.step()
            optimizer.zero_grad()
            found |= {f"{key} {len(found)}": torch.tensor(value) for key, value in metrics.items()}
    return found | {
        f"{of} {key}": value.detach().clone()
        for of, part in (("policy", network), ("critic", state.value.network))
        for key, value in part.state_dict().items()
    }


def dies(folder: Path) -> None:
    """The second process fails in the middle of training; the first one would wait for it for ever."""
    began = 0

    def watch() -> None:
        nonlocal began
        began += 1
        if began == 20 and processes.index() == 1:
            (folder / "died").write_text(str(time.monotonic()))
            raise ZeroDivisionError("the reward of process 1 divides by zero")

    import tiltflow.runs.run

    build = tiltflow.runs.run.build_reward

    def built(*arguments: object, **options: object) -> object:
        reward = build(*arguments, **options)

        def told(x: Tensor) -> Tensor:
            watch()
            return reward(x)

        return told

    tiltflow.runs.run.build_reward = built
    run(shared_recipe(folder, "adjoint-matching", max_train_steps=10_000), folder / "run")


def shared_recipe(folder: Path, method: str, **training: Any) -> Recipe:
    """The recipe of a method, with what it names in a folder that all processes read."""
    place = folder / "parts" / method
    processes.by_main(lambda: recipe_for(place, INTERRUPTED[0] if method in STATELESS else method) and None)
    tree: Any = read_yaml(place / "recipe.yaml")
    tree["method"] = STATELESS.get(method, tree["method"])
    tree["training"] |= {"monitor": None, "non_finite_rewards": "error"} | training
    return validate(Recipe, tree, "recipe")


@contextmanager
def without_reports() -> Iterator[None]:
    """Leaves out the page that a run writes at its end, which takes longer than so short a run; pictures have it."""
    import tiltflow.runs.evaluate

    before, tiltflow.runs.evaluate.write_report = tiltflow.runs.evaluate.write_report, lambda folder: folder
    try:
        yield
    finally:
        tiltflow.runs.evaluate.write_report = before


def make(folder: Path, *names: str) -> None:
    """Let the scenarios leave what they make in `folder`, each under its name."""
    for name in names:
        weights, scenario = name.split("/")
        for variable in {key for settings in WEIGHTS.values() for key in settings}:
            os.environ.pop(variable, None)
        os.environ.update(WEIGHTS[weights])
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        processes.wait()
        with nullcontext() if scenario == "pictures" else without_reports():
            globals()[scenario](place)


def work(folder: Path, *names: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    os.environ.update(WEIGHTS[names[-1].split("/")[0]])  # to begin is more with sharded weights, which come last
    processes.begin("cpu")
    make(folder, *names)
    processes.end()
