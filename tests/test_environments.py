"""OGBench's environments, where they are installed: play that depends on its seed alone, rewards by the environment itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiltflow.errors import InputError
from tiltflow.policies.drawing import choose_renderer, frame
from tiltflow.policies.environments import check_environment, in_sight, make, play, rewards_of
from tiltflow.policies.generation import Play, generate, relabel
from tiltflow.policies.transitions import load_transitions


def test_what_there_is_not_is_refused_in_a_line() -> None:
    with pytest.raises(InputError, match="there is no environment 'cube-singel', did you mean 'cube-single'"):
        check_environment("cube-singel")
    with pytest.raises(InputError, match="task 6: scene has the tasks 1 to 5"):
        check_environment("scene", 6)


def test_where_a_cube_can_be_seen() -> None:
    table, right, drawer, left = [[0.4, 0.0, 0.02], [0.4, 0.3, 0.02], [0.3, -0.31, 0.07], [0.3, -0.31, 0.02]]
    assert [in_sight(np.array([table, place])) for place in (table, right, drawer, left)] == [True, False, True, False]


def played(name: str, index: int, *, seed: int = 0, steps: int = 5) -> dict[str, Any]:
    """An episode without an environment."""
    rng = np.random.default_rng([seed, index])
    terminals = np.arange(steps) == steps - 1
    return {"observations": rng.normal(size=(steps, 3)), "actions": rng.normal(size=(steps, 2)), "terminals": terminals}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No environments and no other processes: what was played."""
    import tiltflow.policies.generation as module

    indices: list[int] = []

    class Here:
        def __init__(self, count: int | None):
            pass

        def map(self, function: Any, items: Any) -> Any:
            for item in items:
                indices.append(item[1])
                yield function(item)

    def rewards(name: str, task: int, rows: Any, *, sparse: bool) -> dict[str, Any]:
        return {"rewards": np.full(len(rows["terminals"]), -float(task)), "masks": np.ones(len(rows["terminals"]))}

    for name, other in (("make", lambda *a: None), ("play", played), ("Workers", Here), ("rewards_of", rewards)):
        monkeypatch.setattr(module, name, other)
    return indices


def test_an_interrupted_generation_goes_on_where_it_was(tmp_path: Path, without: list[int]) -> None:
    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    wanted, output = Play("cube-single", episodes=4, steps=5), tmp_path / "play.npz"
    with pytest.raises(KeyboardInterrupt):
        generate(wanted, output, watch=stop)
    assert not output.exists()
    with pytest.raises(InputError, match=r"has episodes of another play \(environment cube-single, steps 5, seed 0\)"):
        generate(Play("cube-single", episodes=4, steps=5, seed=1), output)
    generate(wanted, output)
    assert without == [0, 1, 2, 3]
    data = load_transitions(output, rewards=True)
    assert data.last.tolist() == [4] * 5 + [9] * 5 + [14] * 5 + [19] * 5
    expected = np.concatenate([played("", i)["observations"] for i in range(4)]).astype(np.float32)
    assert np.array_equal(data.observations.numpy(), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["play.npz"]
    with pytest.raises(InputError, match=r"exists; give another name, or --data"):
        generate(wanted, output)
    relabel(output, tmp_path / "other.npz", "cube-single", task=3)
    other = load_transitions(tmp_path / "other.npz", rewards=True)
    assert other.rewards is not None
    assert set(other.rewards.tolist()) == {-3.0}


# ---- with OGBench ----


def test_without_ogbench_an_environment_is_refused() -> None:
    try:
        import ogbench  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"ogbench is not installed: pip install '.\[control\]'"):
            make("cube-single")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cube-single", "scene", "puzzle-3x3"])
def test_play_depends_on_its_number_and_seed_alone(name: str) -> None:
    pytest.importorskip("ogbench")
    first, other = play(name, 0, steps=60), play(name, 1, steps=60)
    again = play(name, 0, steps=60)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["observations"], other["observations"])
    assert first["terminals"].tolist() == [False] * 59 + [True]
    assert np.abs(first["actions"]).max() <= 1


@pytest.mark.slow
def test_rewards_are_those_that_the_environment_gives() -> None:
    """Of the states of an episode in the environment of the task itself."""
    pytest.importorskip("ogbench")
    environment: Any = make("puzzle-3x3", 1)
    environment.reset(seed=0)
    environment.action_space.seed(0)
    rows: dict[str, list[Any]] = {"qpos": [], "button_states": [], "rewards": []}
    for _ in range(40):
        _, reward, _, _, info = environment.step(environment.action_space.sample())
        for key, value in (("qpos", info["prev_qpos"]), ("button_states", info["prev_button_states"]), ("rewards", reward)):
            rows[key].append(value)
    arrays = {key: np.array(value) for key, value in rows.items()}
    found = rewards_of("puzzle-3x3", 1, {key: arrays[key] for key in ("qpos", "button_states")}, sparse=False)
    assert np.array_equal(found["rewards"], arrays["rewards"])
    sparse = rewards_of("puzzle-3x3", 1, {key: arrays[key] for key in ("qpos", "button_states")}, sparse=True)
    assert np.array_equal(sparse["rewards"], np.where(arrays["rewards"] != 0, -1, 0))
    with pytest.raises(InputError, match="the data are of another environment than puzzle-3x3"):
        rewards_of("puzzle-3x3", 1, {"qpos": arrays["qpos"]}, sparse=False)


@pytest.mark.slow
def test_processes_play_what_one_would(tmp_path: Path) -> None:
    pytest.importorskip("ogbench")
    rows = [generate(Play("cube-single", episodes=2, steps=30), tmp_path / f"{count}.npz", processes=count) for count in (1, 2)]
    assert all(np.array_equal(rows[0][key], rows[1][key]) for key in rows[0])


@pytest.mark.slow
def test_its_own_loader_reads_what_is_generated(tmp_path: Path) -> None:
    """With the rewards and masks that it computes itself."""
    ogbench = pytest.importorskip("ogbench")
    path = tmp_path / "cube-single.npz"
    rows = generate(Play("cube-single", episodes=2, steps=120), path, task=1, processes=1)
    shutil.copy(path, tmp_path / "cube-single-val.npz")
    _, theirs, _ = ogbench.make_env_and_datasets("cube-single-play-singletask-task1-v0", dataset_path=str(path))
    steps = ~rows["terminals"]
    for key in ("observations", "actions", "rewards", "masks"):
        assert np.array_equal(rows[key][steps], theirs[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cube-single", "scene", "puzzle-3x3"])
def test_a_frame_of_the_past_is_the_one_that_was(name: str) -> None:
    """An environment that is put back to where it was is drawn as it was then."""
    pytest.importorskip("ogbench")
    choose_renderer()
    environment: Any = make(name, 1)
    environment.reset(seed=0)
    environment.action_space.seed(0)
    live, told = [], []
    for _ in range(12):
        *_, info = environment.step(environment.action_space.sample())
        told.append(info)
        live.append(np.asarray(frame(environment, info), dtype=float))
    assert np.abs(live[-1] - live[0]).max() > 20
    for i in (0, 6):
        assert np.abs(np.asarray(frame(environment, told[i]), dtype=float) - live[i]).max() <= 2
