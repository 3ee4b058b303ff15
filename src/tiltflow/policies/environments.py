"""OGBench's environments of manipulation: made, played by their own scripted oracles, and rewarded by their tasks.

`ogbench` and MuJoCo are imported where they are used; no window or renderer is needed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from tiltflow.errors import InputError, did_you_mean, not_installed
from tiltflow.plugins import import_function
from tiltflow.streams import stream
from tiltflow.user_code import refused

Arrays = dict[str, np.ndarray[Any, Any]]

STACKING = {"cube-single": (0.0, 0.0), "cube-double": (0.0, 0.25), "cube-triple": (0.05, 0.35), "cube-quadruple": (0.1, 0.5)}
"""Range of the probability, drawn for each episode of play, that a cube is put on another; 0.5 in other environments."""
ENVIRONMENTS = (*STACKING, "scene", "puzzle-3x3", "puzzle-4x4", "puzzle-4x5", "puzzle-4x6")
TASKS = range(1, 6)
NOISE, SMOOTHING = 0.1, 0.5
"""Noise of the plans that oracles follow, and how smooth it is along time."""
OBJECT = 14
"""The first coordinate of an object in `qpos`, after those of the arm and the gripper."""


class Environment(Protocol):
    """What is asked of an environment of gymnasium."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, Mapping[str, Any]]:
        """Begin an episode. Returns (observation, more)."""
        ...

    def step(self, action: Any, /) -> tuple[Any, Any, bool, bool, Mapping[str, Any]]:
        """Take an action. Returns (observation, reward, is the task over, is the time over, more)."""
        ...


def check_environment(name: str, task: int = 1) -> None:
    """Raise InputError for an environment that is not known, or a task that it does not have."""
    if name not in ENVIRONMENTS:
        raise InputError(f"there is no environment {name!r}{did_you_mean(name, ENVIRONMENTS)}")
    if task not in TASKS:
        raise InputError(f"task {task}: {name} has the tasks 1 to {TASKS[-1]}")


def make(name: str, task: int | None = None, *, sparse: bool = False, **options: Any) -> Any:
    """Make an environment, with the rewards of a task, or without. Raises InputError if it cannot be made.

    Args:
        sparse: rewards of -1 wherever they are not 0.
    """
    check_environment(name, task or 1)
    os.environ.setdefault("MUJOCO_GL", "disable")
    try:
        import gymnasium
        import ogbench.manipspace  # noqa: F401
    except ImportError:
        raise not_installed("ogbench", "control") from None
    warnings.filterwarnings("ignore", ".*precision lowered by casting to float32")  # of its own spaces, whenever it looks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = gymnasium.make(f"{name}-v0" if task is None else f"{name}-singletask-task{task}-v0", **options)
    return gymnasium.wrappers.TransformReward(made, lambda reward: -float(reward != 0)) if sparse else made


def is_own(name: str) -> bool:
    """Whether an environment is the user's: `package.module:function`, which makes one of gymnasium."""
    return ":" in name


def make_any(name: str, task: int = 1, *, sparse: bool = False) -> Environment:
    """Make an environment of OGBench with the rewards of a task, or one of the user's own. Raises InputError if it cannot be
    made."""
    if not is_own(name):
        return make(name, task, sparse=sparse)  # type: ignore[no-any-return]
    with refused(f"environment {name}: cannot be made"):
        return import_function(name, "environment")()  # type: ignore[no-any-return]


def play(name: str, index: int, *, seed: int = 0, steps: int = 1001) -> Arrays:
    """An episode of play: an oracle reaches one random goal after another, by plans with noise. [steps] rows, of which the last
    has no step.

    It depends on the name, index, seed and number of steps alone. Oracles draw from NumPy's global generator, which is seeded:
    call this in a process of its own. Episodes of `scene` in which the cube is lost from sight are played anew, as in OGBench.

    Raises InputError if the environment cannot be made.
    """
    environment = make(name, terminate_at_goal=False, mode="data_collection", max_episode_steps=steps)
    oracles = oracles_of(name, environment)
    for attempt in range(1000):
        episode = _played(name, environment, oracles, stream(seed, "play", index, attempt).initial_seed() % 2**32)
        if name != "scene" or in_sight(episode["qpos"][:, OBJECT : OBJECT + 3]):
            return episode
    raise InputError(f"{name}: episode {index} was played in vain a thousand times")


def _played(name: str, environment: Any, oracles: Mapping[str, Any], seed: int) -> Arrays:
    np.random.seed(seed)
    rows: dict[str, list[Any]] = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
    observation, info = environment.reset(seed=seed)
    stacking = np.random.uniform(*STACKING.get(name, (0.5, 0.5)))
    oracle, over = oracles[info["privileged/target_task"]], False
    oracle.reset(observation, info)
    while not over:
        action = np.clip(np.asarray(oracle.select_action(observation, info)), -1, 1)
        after, _, terminated, truncated, info = environment.step(action)
        over = terminated or truncated
        if oracle.done:
            seen, told = environment.unwrapped.set_new_target(p_stack=stacking)
            oracle = oracles[told["privileged/target_task"]]
            oracle.reset(seen, told)
        values = (observation, action, over, info["prev_qpos"], info["prev_qvel"])
        for key, value in zip(("observations", "actions", "terminals", "qpos", "qvel"), values, strict=True):
            rows[key].append(value)
        if "prev_button_states" in info:
            rows.setdefault("button_states", []).append(info["prev_button_states"])
        observation = after
    kinds = {"terminals": bool, "button_states": np.int64}
    return {key: np.array(values, dtype=kinds.get(key, np.float32)) for key, values in rows.items()}


def oracles_of(name: str, environment: Any) -> dict[str, Any]:
    """The oracles of an environment, by the kind of object that they move."""
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    kinds = {"cube": CubePlanOracle, "button": ButtonPlanOracle, "drawer": DrawerPlanOracle, "window": WindowPlanOracle}
    options: dict[str, Any] = {"env": environment, "noise": NOISE, "noise_smoothing": SMOOTHING}
    if name.startswith("puzzle"):
        return {"button": ButtonPlanOracle(**options, gripper_always_closed=True)}
    names = ["cube"] if name.startswith("cube") else list(kinds)
    return {each: kinds[each](**options) for each in names}


def in_sight(cube: np.ndarray[Any, Any]) -> bool:
    """Whether a cube at these places [rows, 3] was always on the table, or in the drawer on its left."""
    y, z = cube[:, 1], cube[:, 2]
    return not ((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any()


def rewards_of(name: str, task: int, rows: Arrays, *, sparse: bool) -> Arrays:
    """Rewards and masks of the rows of a data set for a task: minus the number of sub-goals that are not reached before a step,
    and 0 for a step from where all are.

    Args:
        sparse: -1 in place of any such number.

    Raises InputError if the environment cannot be made, or the rows are of another.
    """
    from ogbench.relabel_utils import relabel_dataset

    environment, found = make(name, task), dict(rows)
    try:
        relabel_dataset(f"{name}-singletask-task{task}-v0", environment, found)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"the data are of another environment than {name} ({type(error).__name__}: {error})") from None
    rewards = -(found["rewards"] != 0).astype(np.float32) if sparse else found["rewards"]
    return {"rewards": rewards, "masks": found["masks"]}
