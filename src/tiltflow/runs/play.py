"""Episodes of the policy of a folder, and of the base that it was tuned from: played, filmed, and kept with a run."""

# Mutation tests: test_played.py

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tiltflow.errors import InputError
from tiltflow.evaluation.episodes import Actor, BestOf, play_episodes
from tiltflow.evaluation.played import Played, Seen, seen, write_played
from tiltflow.files import read_json
from tiltflow.policies.drawing import OF_GYMNASIUM, OF_OGBENCH, Film, choose_renderer, draws
from tiltflow.policies.environments import check_environment, is_own, make_any
from tiltflow.reports.report import write_report
from tiltflow.runs.policy_of_run import base_of, is_run, policy_of
from tiltflow.user_code import refused

OF_VIDEO = 51
"""Frames of a video: of 200 steps every fourth one."""


@dataclass(frozen=True)
class Asked:
    """What is to be played.

    Args:
        environment: name of an environment of OGBench, or `package.module:function`, which makes one.
        task, sparse: of OGBench; see `policies.environments.make`.
        episodes: of each policy.
        best_of: of so many chunks the one is taken that the critics value most.
        base: whether the base of a run is played too, from the same beginnings.
        films: first episodes of each policy of which frames are kept with a run.
        video: whether more frames of the first one are wanted.
    """

    environment: str
    task: int = 1
    sparse: bool = False
    episodes: int = 50
    best_of: int = 1
    seed: int = 0
    base: bool = True
    films: int = 3
    video: bool = False

    def reel(self, name: str, films: int) -> list[Film]:
        """Films of the first episodes of a policy."""
        camera = OF_GYMNASIUM if is_own(self.environment) else OF_OGBENCH
        made = [Film(camera) for _ in range(min(films, self.episodes))]
        return [Film(camera, OF_VIDEO), *made[1:]] if name == "tuned" and self.video else made


def play(folder: Path, asked: Asked, *, device: str = "cpu") -> tuple[Played, Film | None]:
    """Play what is asked for with the policy of a folder; with a run it is kept, and its report is written again.

    Returns (the episodes, the film of the first one of the tuned policy, if there is one).
    Raises InputError for a policy, an environment or a setting that cannot be had.
    """
    own, of_run = is_own(asked.environment), is_run(folder)
    if not own:
        check_environment(asked.environment, asked.task)
    policy, valued = policy_of(folder, device)
    if asked.best_of > 1 and valued is None:
        raise InputError(f"--best-of {asked.best_of}: {folder} has no critics; give the folder of a run with reward q-function")
    actors: dict[str, Actor] = {"base": base_of(folder, device)} if of_run and asked.base else {}
    actors["tuned"] = policy if valued is None or asked.best_of == 1 else BestOf(policy, valued.values, asked.best_of)
    make = partial(make_any, asked.environment, asked.task, sparse=asked.sparse)
    if not own and (asked.video or (of_run and asked.films)):
        choose_renderer()
    if own and asked.video and not draws(make()):
        raise InputError(f'--video: environment {asked.environment} draws nothing; make it with render_mode="rgb_array"')
    policies, reel = dict[str, list[Seen]](), list[Film]()
    for name, actor in actors.items():
        reel, values = asked.reel(name, asked.films if of_run else 0), valued if name == "tuned" else None
        with refused(f"environment {asked.environment}: cannot be played") if own else nullcontext():
            episodes = play_episodes(actor, make, asked.episodes, seed=asked.seed, valued=values, watches=reel)
        policies[name] = seen(episodes, reel[: asked.films])
    summary = read_json(folder / "summary.json") if of_run and (folder / "summary.json").exists() else {}
    task = None if own else asked.task
    played = Played(asked.environment, task, asked.seed, asked.best_of, summary.get("iterations"), policies)
    if of_run:
        write_played(folder, played)
    if summary:
        write_report(folder)
    return played, next(iter(reel), None)
