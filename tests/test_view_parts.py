"""Samples that are drawn on the page, and pairs that are rated on it: as the commands do it, and for the user alone."""

from __future__ import annotations

import base64
import io
import json
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from browser import browser, needs_chromium
from servers import served_by_command
from test_view import ask, served
from torch import nn
from typer.testing import CliRunner

from tiltflow import allow_code, load
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models.model import Model
from tiltflow.rewards.serving.votes import Votes
from tiltflow.runs.ballot import before_and_after
from tiltflow.settings import validate
from tiltflow.view.parts import sampling

DRAW, VOTES = "/api/sampling/draw?at=run", "/api/rating"


@pytest.fixture(scope="module")
def run(parted_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pictures before and after differ."""
    return Path(shutil.copytree(parted_run, tmp_path_factory.mktemp("parts") / "run"))


@pytest.fixture
def rated(run: Path) -> Iterator[Path]:
    """The same run, whose votes are moved out of the way afterwards."""
    yield run
    for i in range(100):
        if (run / "votes").exists() and not (to := run.parent / f"votes-{i}").exists():
            (run / "votes").rename(to)


def post(port: int, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    status, text = ask(port, path, "POST", body)
    return status, json.loads(text)


def picture_at(port: int, path: str) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Content-Type")) == (200, "image/png")
    data = answer.read()
    connection.close()
    return data


# ---- samples ----


@pytest.mark.parametrize("changes", [{"tilt_strength": 0.0}, {"tilt_strength": 0.5, "num_inference_steps": 3}, {"seed": 7}])
def test_the_page_draws_what_the_command_that_it_names_draws(run: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    with served(run) as port:
        status, found = post(port, DRAW, {"num_samples": 4} | changes)
    assert status == 200
    command = shlex.split(found["command"])
    assert command[:3] == ["tiltflow", "sample", str(run)]
    done = CliRunner().invoke(app, [*command[1:], "-o", str(tmp_path / "same.png"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert base64.b64decode(found["picture"].partition(",")[2]) == (tmp_path / "same.png").read_bytes()


def test_what_a_run_can_be_asked_for_is_known_without_loading_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "load_both", None)
    with served(run) as port:
        found = json.loads(ask(port, "/api/sampling/options?at=run")[1])
    assert found == {"classes": [], "prompts": None, "num_inference_steps": 4, "num_samples": 16}


def test_the_model_is_loaded_once_and_requests_wait_for_one_another(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, inside, most = list[Path](), [0], [0]
    load_both, drawn = sampling.load_both, sampling.drawn

    def counted(folder: Path, device: str) -> Any:
        loads.append(folder)
        return load_both(folder, device)

    def slowly(*arguments: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return drawn(*arguments)

    monkeypatch.setattr(sampling, "load_both", counted)
    monkeypatch.setattr(sampling, "drawn", slowly)
    codes = list[int]()
    with served(run) as port:
        body = {"num_samples": 1, "num_inference_steps": 1}
        threads = [threading.Thread(target=lambda: codes.append(post(port, DRAW, body)[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (codes, len(loads), most[0]) == ([200] * 4, 1, 1)
        (run / "model").touch()  # tuned further
        assert post(port, DRAW, body)[0] == 200
        assert len(loads) == 2


def test_mistakes_are_one_line(run: Path) -> None:
    wrong: list[tuple[Any, str]] = [
        ({"tilt_strength": -1}, "tilt_strength"),
        ({"tilt_strength": float("nan")}, "tilt_strength"),
        ({"num_samples": 65}, "num_samples"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"condition": "a cat"}, "there is no class 'a cat'"),
        ({"steps": 3}, "steps is not a setting"),
        ([1], "must be a mapping"),
        ("x", "must be a mapping"),
    ]
    with served(run) as port:
        for body, message in wrong:
            status, found = post(port, DRAW, body)
            assert status == 400, body
            assert message in found["error"]
            assert "\n" not in found["error"]
        for key in ("../run", "run/model", "run/..", "/etc"):
            assert ask(port, f"/api/sampling/draw?at={quote(key)}", "POST", {})[0] == 404
            assert ask(port, f"/api/rating/begin?at={quote(key)}", "POST", {})[0] == 404
        for path in (DRAW, f"{VOTES}/begin?at=run", f"{VOTES}/vote?at=run"):
            assert ask(port, path, "POST", {}, Host="evil.example")[0] == 403
            assert ask(port, path, "POST", {}, **{"Content-Type": "text/plain"})[0] == 403
            assert ask(port, path)[0] == 404  # nothing is drawn or counted by a GET, which a link can make
    assert not (run / "votes").exists()


def test_code_of_a_run_is_run_with_consent_alone(parted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(parted_run, tmp_path / "run"))
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"network": {"name": "factory", "path": "theirs:build"}}))
    (tmp_path / "theirs.py").write_text("from tiny import UNET\n\ndef build():\n    return UNET.build()\n")
    monkeypatch.syspath_prepend(tmp_path)
    body = {"num_samples": 1, "num_inference_steps": 1}
    with served(folder) as port:
        for path in (DRAW, f"{VOTES}/begin?at=run"):
            status, found = post(port, path, body if path == DRAW else {})
            assert status == 400
            assert "theirs:build, which is code; if you trust the folder, add --allow-code" in found["error"]
    with allow_code(), served(folder) as port:  # in this thread, and not in those that answer
        assert post(port, DRAW, body)[0] == 200


@pytest.mark.slow
def test_a_pipeline_is_asked_for_a_prompt_and_its_lora_is_scaled(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from test_run_text_to_image import recipe_for, train

    train(recipe_for(tmp_path, "stable-diffusion"), tmp_path / "run")
    found = list[str]()
    with served(tmp_path / "run") as port:
        asked = json.loads(ask(port, "/api/sampling/options?at=run")[1])
        assert (asked["classes"], asked["num_samples"], len(asked["prompts"])) == ([], 4, 1)
        assert "needs a prompt" in post(port, DRAW, {})[1]["error"]
        for strength in (0.0, 0.5, 1.0):
            body = {"tilt_strength": strength, "condition": "a red cat", "num_samples": 2}
            found.append(post(port, DRAW, body)[1]["picture"])
            drawn = load(tmp_path / "run", tilt_strength=strength).sample(2 * ["a red cat"])
            picture = io.BytesIO()
            sampling.drawn(drawn, 1).save(picture, "PNG")
            assert base64.b64decode(found[-1].partition(",")[2]) == picture.getvalue()
        assert len(set(found)) == 3
        state = post(port, f"{VOTES}/begin?at=run", {"num_pairs": 3})[1]
        assert (state["total"], state["prompt"]) == (3, asked["prompts"][0])


def test_classes_are_asked_for_in_turn_or_one_of_them() -> None:
    model = Model(Flow(nn.Identity()), (2,), class_names=("cat", "dog", "owl"))
    in_turn = validate(sampling.Asked, {"num_samples": 4}, "sample").items(model)
    assert [item.metadata["label"] for item in in_turn] == [0, 1, 2, 0]
    one = sampling.Asked(condition="dog", num_samples=2)
    assert [item.metadata["label"] for item in one.items(model)] == [1, 1]
    assert "--label dog" in one.command(Path("runs/a"), model)
    with pytest.raises(InputError, match="there is no class 'cow'"):
        sampling.Asked(condition="cow").items(model)


def test_a_run_that_is_not_tuned_yet_has_no_samples(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with served(tmp_path / "new") as port:
        for path in ("/api/sampling/draw?at=new", "/api/rating/begin?at=new"):
            status, text = ask(port, path, "POST", {})
            assert (status, "it has no model" in text or "it has no metrics" in text) == (400, True), text
        status, text = ask(port, "/api/sampling/options?at=new")
        assert (status, "it has no model" in json.loads(text)["none"]) == (200, True)
    assert not (tmp_path / "new" / "votes").exists()


# ---- ratings ----


def test_pairs_are_rated_blind_saved_at_once_and_gone_on_with(rated: Path) -> None:
    with served(rated) as port:
        assert json.loads(ask(port, f"{VOTES}/state?at=run")[1])["total"] == 0
        assert ask(port, f"{VOTES}/vote?at=run", "POST", {"pair": 0, "side": "left"})[0] == 404
        status, state = post(port, f"{VOTES}/begin?at=run", {"num_pairs": 6, "seed": 3})
        assert (status, state["pair"], state["total"]) == (200, 0, 6)
        votes = Votes.open(rated / "votes")
        left = [votes.first_is_left(i) for i in range(6)]
        assert 0 < sum(left) < 6
        base, tuned = before_and_after(rated, "cpu")
        assert not torch.equal(base.sample(1), tuned.sample(1))
        for i, side in enumerate(("left", "right", "tie")):
            shown = [picture_at(port, f"{VOTES}/picture?at=run&pair={i}&side={each}") for each in ("left", "right")]
            files = [votes.picture(i, n).read_bytes() for n in (0, 1)]
            assert shown == (files if left[i] else files[::-1])
            assert files[0] != files[1]
            state = post(port, f"{VOTES}/vote?at=run", {"pair": i, "side": side})[1]
            assert (
                Votes.open(rated / "votes").choices
                == ["first" if left[0] else "second", "second" if left[1] else "first", "tie"][: i + 1]
            )
        assert "equal 1: after is chosen in" in state["words"]
        assert post(port, f"{VOTES}/vote?at=run", {"pair": 1, "side": "left"})[1]["pair"] == 3  # of a page that is behind
        assert post(port, f"{VOTES}/vote?at=run", {"pair": 3, "side": "undo"})[1]["pair"] == 2
        for pair in ("9", "-1", "../0", "x", ""):
            assert ask(port, f"{VOTES}/picture?at=run&pair={pair}&side=left")[0] == 404
        assert ask(port, f"{VOTES}/picture?at=run&pair=0&side=first")[0] == 404
        for body in ([], {"pair": 2}, "x"):
            assert post(port, f"{VOTES}/vote?at=run", body)[0] == 400
    with served(rated) as port:
        assert post(port, f"{VOTES}/begin?at=run", {"num_pairs": 50})[1]["pair"] == 2  # the pairs that are there
    done = served_by_command(["vote", str(rated), "-o", str(rated / "votes"), "--device", "cpu"], lambda root: None)
    assert "2 of 6 done" in done.output


def test_damaged_votes_are_said_so(rated: Path) -> None:
    with served(rated) as port:
        post(port, f"{VOTES}/begin?at=run", {"num_pairs": 2})
        (rated / "votes" / "votes.jsonl").write_text('{"step": 0, "choice": "third"}\n')
        for path, body in (("state", None), ("begin", {}), ("vote", {"pair": 0, "side": "left"})):
            status, text = ask(port, f"{VOTES}/{path}?at=run", "GET" if body is None else "POST", body)
            assert (status, "is damaged" in text) == (400, True)


# ---- in a browser ----


@needs_chromium
def test_in_a_browser_the_slider_draws_and_keys_rate(rated: Path) -> None:
    with served(rated) as port, browser() as tab:
        tab.show(390, 844)
        tab.go(f"http://127.0.0.1:{port}/")
        tab.wait("!sampling.hidden && !rating.hidden")
        tab.press("t")
        tuned = tab.wait("!sampling.querySelector('img').hidden && sampling.querySelector('img').src")
        tab.value("strength.value = 0; strength.dispatchEvent(new Event('input'))")
        tab.wait(f"sampling.querySelector('img').src !== {json.dumps(tuned)}")
        assert "--tilt-strength 0 " in tab.wait("sampling.querySelector('pre').textContent")
        tab.value(
            "sampling.querySelector('#steps').value = 0; sampling.querySelector('#steps').dispatchEvent(new Event('change'))"
        )
        tab.value("rating.querySelector('select').value = 20")
        tab.press("r")
        tab.wait("document.querySelector('dialog#rating-of-pairs').open")
        for i, key in enumerate(("ArrowLeft", "ArrowRight", " ", "z", " ")):
            tab.wait(f"document.querySelector('dialog#rating-of-pairs progress').value === {i if i < 4 else 2}")
            tab.press(key)
        tab.wait("document.querySelector('dialog#rating-of-pairs progress').value === 3")
        votes = Votes.open(rated / "votes")
        assert votes.choices == [
            "first" if votes.first_is_left(0) else "second",
            "second" if votes.first_is_left(1) else "first",
            "tie",
        ]
        assert len(votes) == 20
        words = tab.value("document.querySelector('dialog#rating-of-pairs').textContent")
        assert not {"before", "after", "base", "tuned"} & set(words.lower().split())
        for width in (390, 1280):
            tab.show(width, 844)
            for part in ("sampling", "rating"):
                assert tab.value(f"{part}.scrollWidth <= {part}.clientWidth")
            assert tab.value("(d => d.scrollHeight <= d.clientHeight)(document.querySelector('dialog#rating-of-pairs'))")
        tab.press("Escape")
        tab.wait("rating.textContent.includes('equal 1') && rating.textContent.includes('go on, 17 are left')")
        assert tab.console == []
