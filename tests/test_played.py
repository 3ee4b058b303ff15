"""Episodes of a run that are kept with it, and how its report and the page of `tiltflow view` show them."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser, needs_chromium
from PIL import Image
from test_online import Corridor
from test_q_function import of_critics
from test_report import SUMMARY, Balanced, words, write
from test_view import ask, served
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.evaluation.episodes import Episode, play_episodes, summary_of
from tiltflow.evaluation.played import Played, Seen, folders_of, read_played, seen, strip_of, write_played
from tiltflow.policies import drawing
from tiltflow.policies.drawing import OF_GYMNASIUM, Camera, Film, choose_renderer
from tiltflow.reports.episodes import task_of, values_of
from tiltflow.reports.report import write_report
from tiltflow.runs.play import Asked, play
from tiltflow.runs.policy_of_run import base_of, policy_of
from tiltflow.runs.run import run
from tiltflow.streams import stream

CORRIDOR = "test_online:Corridor"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with critics, hardly trained."""
    folder = tmp_path_factory.mktemp("played")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiltflow.reports.plots.LAYOUT", None)
        run(of_critics(folder), folder / "run")
    return folder / "run"


class Greys:
    """An environment that draws itself as a grey, its step; it has no end."""

    render_mode: str | None = "rgb_array"

    def __init__(self) -> None:
        self.steps = 0

    def render(self) -> Any:
        return np.full((20, 40, 3), self.steps, np.uint8)


def film_of(steps: int, camera: Camera = OF_GYMNASIUM, **options: Any) -> Film:
    """A film of an episode of so many steps, at places (step, -step, 7)."""
    film, environment = Film(camera, **options), Greys()
    for step in range(steps + 1):
        environment.steps = step
        film(environment, np.array([step, -step, 7.0]), {}, step == steps)
    return film


def strips(count: int, grey: int) -> bytes:
    return strip_of([Image.new("RGB", (40, 40), (grey + 10 * i,) * 3) for i in range(count)])


def by_hand(environment: str = "cube-single", task: int | None = 1, **changes: Any) -> Played:
    """Two policies and four episodes; frames of the first one, or its path."""
    found = [(True, -5.0, 5, True), (False, -10.0, 10, False), (True, -2.0, 2, True), (True, -1.0, 1, True)]
    tuned = [Episode(*row[:3], value=float(i), discounted=row[1] / 2, over=row[3]) for i, row in enumerate(found)]
    base = [Episode(success, -10.0, 10, over=success) for success in (False, True, False, False)]
    kept: list[dict[str, Any]] = [{"strip": strips(6, 90 * i), "steps": (0, 1, 2, 3, 4, 5)} for i in (0, 1)]
    if task is None:
        kept = [{"path": ((0.0, 0.0), (1.0, 2.0 + i)), "steps": (0, 5)} for i in (0, 1)]
    policies = {
        name: [Seen(episodes[0], **first), *map(Seen, episodes[1:])]
        for name, episodes, first in (("base", base, kept[0]), ("tuned", tuned, kept[1]))
    }
    return Played(
        **{"environment": environment, "task": task, "seed": 0, "best_of": 1, "iterations": 2, "policies": policies} | changes
    )


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["evaluate-policy", *words, "--device", "cpu"])


# ---- played ----


def test_episodes_of_a_run_are_those_of_its_policies_and_in_its_report(tuned: Path) -> None:
    assert 'id="episodes"' not in (tuned / "report.html").read_text()
    done = invoke(str(tuned), "--environment", CORRIDOR, "--episodes", "4", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    policy, valued = policy_of(tuned)
    base = summary_of(play_episodes(base_of(tuned), Corridor, 4))
    assert printed["base"] == base
    expected = summary_of(play_episodes(policy, Corridor, 4, valued=valued))
    assert {key: printed[key] for key in expected} == expected
    page = (tuned / "report.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    shown = html.unescape(words(page))
    for found in (base, expected):
        assert f"{found['successes']} of 4" in shown
        assert f"{found['return']:.2f}".replace("-", "−") in shown or f"{found['return']:.1f}".replace("-", "−") in shown
    assert f"tiltflow evaluate-policy ./run --environment {CORRIDOR}" in shown
    assert page.count('class="scene"') == 3
    kept = read_played(folders_of(tuned)[0])
    assert [each.episode for each in kept.policies["tuned"]] == play_episodes(policy, Corridor, 4, valued=valued)
    began = [Corridor().reset(seed=stream(0, "episode", i).initial_seed() % 2**31)[0][:2] for i in range(3)]
    for several in kept.policies.values():
        assert [each.path[0] for each in several[:3]] == [tuple(place) for place in began]
        assert [each.steps for each in several[:3]] == [tuple(range(each.episode.steps + 1)) for each in several[:3]]
        assert several[3].path == ()


class Drawn(Corridor):
    """It draws itself: a grey that is its step."""

    render_mode: str | None = "rgb_array"

    def render(self) -> Any:
        return np.full((30, 30, 3), 30 * self.steps, np.uint8)


def test_what_is_asked_for_is_filmed(tuned: Path, tmp_path: Path) -> None:
    """Two episodes of the tuned policy alone, with frames, and a video of the first."""
    folder = Path(shutil.copytree(tuned, tmp_path / "run"))
    video = tmp_path / "first.gif"
    options = ["--environment", "test_played:Drawn", "--episodes", "3", "--films", "2", "--no-base", "--video", str(video)]
    done = invoke(str(folder), *options)
    assert done.exit_code == 0, done.output
    assert "of the base" not in done.output
    played = next(read_played(each) for each in folders_of(folder) if "Drawn" in each.name)
    assert list(played.policies) == ["tuned"]
    first, second, third = played.policies["tuned"]
    assert (third.strip, third.path) == (None, ())
    for each in (first, second):
        assert each.strip is not None
        with Image.open(io.BytesIO(each.strip)) as strip:
            assert strip.size == (len(each.steps) * 32 - 2, 30)
            assert strip.convert("L").getpixel((strip.width - 10, 15)) == pytest.approx(30 * each.episode.steps, abs=3)
    with Image.open(video) as frames:
        assert frames.n_frames == first.episode.steps + 1  # type: ignore[attr-defined]
        assert frames.info["duration"] == 50
    unseen, film = play(folder, Asked("test_played:Drawn", episodes=1, base=False, films=0, video=True))
    assert unseen.policies["tuned"][0].strip is None
    assert film is not None


def test_a_model_is_played_alone_and_keeps_nothing(tuned: Path) -> None:
    model = tuned.parent / "policy"
    before = sorted(model.iterdir())
    played, film = play(model, Asked(CORRIDOR, episodes=2))
    assert (list(played.policies), film) == (["tuned"], None)
    assert sorted(model.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--environment", "test_played:Fails"], "environment test_played:Fails: cannot be played.*out of order"),
        (["--environment", "test_online:broken"], "environment test_online:broken: cannot be made.*no display"),
        (["--environment", "test_online:none"], "test_online has no 'none'"),
        (["--environment", "cube-singel"], "there is no environment 'cube-singel'"),
        (["--environment", CORRIDOR, "--video", "x.gif"], "draws nothing; make it with render_mode="),
    ],
)
def test_mistakes_are_one_line(tuned: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = invoke(str(tuned), *[str(tmp_path / word) if word == "x.gif" else word for word in words])
    assert isinstance(done.exception, InputError)
    assert re.search(message, str(done.exception))
    assert not (tmp_path / "x.gif").exists()


class Fails(Corridor):
    def step(self, action: Any) -> Any:
        raise RuntimeError("out of order")


# ---- seen ----


@pytest.mark.parametrize("steps", [0, 3, 5, 64, 200, 1000])
def test_frames_are_evenly_spaced(steps: int) -> None:
    """The grey of a frame is its step, modulo 256."""
    film = film_of(
        steps,
        Camera(lambda environment, info: environment.steps, lambda environment, step: Image.new("L", (4, 4), step % 256), 64),
    )
    count = min(6, steps + 1)
    assert len(film.frames) == count
    assert [*film.frames][:: max(1, count - 1)] == ([0, steps] if steps else [0])
    apart = np.diff([*film.frames])
    assert (abs(apart - steps / max(1, count - 1)) <= max(1, steps / 32)).all()
    assert all(frame.getpixel((0, 0)) == step % 256 for step, frame in film.frames.items())


def test_a_strip_has_the_frames_in_their_order_and_is_small() -> None:
    film = film_of(200)
    (kept,) = seen([Episode(True, 0.0, 200)], [film])
    assert kept.strip is not None
    with Image.open(io.BytesIO(kept.strip)) as strip:
        assert strip.size == (6 * 40 + 5 * 2, 20)
        greys = [strip.convert("L").getpixel((42 * i + 20, 10)) for i in range(6)]
    assert (kept.steps[0], kept.steps[-1]) == (0, 200)
    assert greys == pytest.approx(kept.steps, abs=3)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)  # nothing is larger
    assert len(strip_of([Image.fromarray(noise)] * 6)) < 150_000


def test_where_nothing_is_drawn_there_is_a_path() -> None:
    unseen = Camera(lambda environment, info: None, lambda environment, moment: moment, 64)
    (kept,) = seen([Episode(True, 0.0, 250)], [film_of(250, unseen)])
    assert kept.strip is None
    assert len(kept.path) <= 101
    assert kept.path == tuple((step, -step) for step in kept.steps)
    assert (kept.steps[0], kept.steps[-1]) == (0, 250)


def test_a_renderer_that_does_not_work_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "find_library", lambda name: "lib")
    for trial, expected in (("raise SystemExit(3)", None), ("import os; assert os.environ['MUJOCO_GL'] == 'egl'", "egl")):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        monkeypatch.setattr(drawing, "TRIAL", trial)
        choose_renderer()
        assert os.environ.get("MUJOCO_GL") == expected
    monkeypatch.setenv("MUJOCO_GL", "disable")
    choose_renderer()
    assert os.environ["MUJOCO_GL"] == "disable"


# ---- kept and shown ----


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    for played in (by_hand(), by_hand("a.b:c/../d", None), by_hand(policies={"tuned": by_hand().policies["tuned"]})):
        folder = write_played(tmp_path, played)
        assert folder.parent == tmp_path / "episodes"
        assert read_played(folder) == played
    assert [folder.name for folder in folders_of(tmp_path)] == ["a-b-c-d", "cube-single-task-1"]
    assert sorted(path.name for path in folders_of(tmp_path)[1].iterdir()) == ["episodes.json", "tuned-0.webp"]


def test_the_table_by_hand() -> None:
    """Of 4 episodes the tuned policy solves 3, Wilson 30 % to 95 %, and the base another one."""
    task = task_of(by_hand(), 2)
    base, tuned = task.rows
    assert base == ["cube-single, task 1", "base", "25%, 1 of 4", "5% to 70%", "−10.0", "10.0", "–", "–", "–"]
    assert tuned[1:4] == ["tuned", "75%, 3 of 4", "30% to 95%"]
    assert tuned[4:6] == ["−4.5 ± 2.0", "4.50"]
    assert tuned[6:] == ["1.50", "−2.25", "3.00 ± 0.29"]
    assert task.success == ["25%", "75%", "30% to 95%"]
    assert task.notes == [
        "Of 4 beginnings the tuned policy solved 3 that the base did not, and the base 1 that the tuned one did not."
    ]
    assert "played after 2 iterations, and the policy has 9 now" in task_of(by_hand(), 9).notes[1]
    assert task_of(by_hand(best_of=8), 2).rows[1][1] == "best of 8, tuned"


def test_values_are_drawn_beside_returns() -> None:
    """A dot for each episode that has both, where it belongs: filled if its return is known."""
    svg = values_of(by_hand().policies["tuned"])
    dots = re.findall(r'<use [^>]*x="([^"]+)" y="([^"]+)" style="(fill-opacity: 0;|fill: var\(--tuned)', svg)
    assert [style == "fill-opacity: 0;" for *_, style in dots] == [True, False, False, False]
    for known, axis in (([1, 0, 2, 3], 0), ([-5, -2.5, -1, -0.5], 1)):
        drawn = [float(dot[axis]) for dot in dots]
        slope, start = np.polyfit(known, drawn, 1)
        assert drawn == pytest.approx(list(slope * np.array(known) + start), abs=1e-3)
        assert (slope > 0) == (axis == 0)  # pixels count downwards
    assert values_of(by_hand().policies["base"]) == ""
    assert values_of([Seen(Episode(True, 0.0, 1, value=float("nan"), discounted=1.0))]) == ""


def test_a_report_shows_strips_paths_and_numbers(tmp_path: Path) -> None:
    write(tmp_path / "even", SUMMARY)
    before = (tmp_path / "even" / "report.html").read_bytes()
    for played in (by_hand(), by_hand("my.<b>:env", None)):
        write_played(tmp_path / "even", played)
    page = write_report(tmp_path / "even").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<b>:env" not in page
    found = [base64.b64decode(data) for data in re.findall(r"data:image/webp;base64,([^\"]+)", page)]
    assert found == [strips(6, 0), strips(6, 90)]
    section = page[page.index('id="episodes"') :]
    shown = html.unescape(" ".join(words(section).split()))
    assert "base no success, return −10.0, 10 steps" in shown
    assert "tuned success, return −5.00, 5 steps; value 0.00, discounted return −2.50" in shown
    assert "observation 2" in section
    assert "Success: cube-single, task 1 25% → 75% 95 %: 30% to 95%" in html.unescape(" ".join(words(page).split()))
    for folder in folders_of(tmp_path / "even"):
        (folder / "episodes.json").write_text('{"policies": {"tuned": [{"success": "x"}]}}')
    damaged = words(write_report(tmp_path / "even").read_text(encoding="utf-8"))
    assert damaged.count("is damaged, or of an earlier version") == 2
    for folder in folders_of(tmp_path / "even"):
        (folder / "episodes.json").unlink()
    assert write_report(tmp_path / "even").read_bytes() == before


def test_the_page_of_a_run_changes_when_it_is_played(tmp_path: Path) -> None:
    write(tmp_path / "even", SUMMARY)
    with served(tmp_path / "even") as port:
        stamps = [ask(port, "/api/place?at=even")[1]]
        write_played(tmp_path / "even", by_hand())
        stamps.append(ask(port, "/api/place?at=even")[1])
        assert "30% to 95%" in json.loads(ask(port, "/api/report?at=even")[1])["html"]
        write_played(tmp_path / "even", by_hand(seed=1))
        stamps.append(ask(port, "/api/place?at=even")[1])
    assert len(set(stamps)) == 3


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with browser() as tab:
        yield tab


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, False), pytest.param(1280, True, marks=pytest.mark.slow)])
def test_episodes_in_a_browser(tmp_path: Path, opened: Browser, width: int, dark: bool) -> None:
    """Nothing is wider than the screen, all frames are seen, and the console has nothing to say."""
    write(tmp_path / "even", SUMMARY)
    for played in (by_hand(), by_hand("test:walk", None)):
        write_played(tmp_path / "even", played)
    report = write_report(tmp_path / "even")
    with served(tmp_path / "even") as port:
        for address in (report.as_uri(), f"http://127.0.0.1:{port}/"):
            opened.begin()
            opened.show(width, 900, dark)
            opened.go(address)
            assert opened.value("document.documentElement.scrollWidth") <= width
            opened.value("document.querySelector('.scene img').scrollIntoView()")
            images = "[...document.querySelectorAll('.scene img')]"
            opened.wait(f"{images}.length === 2 && {images}.every((each) => each.complete && each.naturalWidth === 250)")
            assert opened.value("document.querySelectorAll('#episodes .scene svg').length") == 1
            assert opened.console == []
