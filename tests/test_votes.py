"""Votes: what the page is told and does, blind, undone, gone on with, and for nobody else's pages."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import served_by_command, serving
from tiny import tiny_flow, tiny_recipe

from tiltflow.errors import InputError
from tiltflow.rewards.serving.votes import Choice, Votes, read_picture
from tiltflow.rewards.serving.voting import make_page
from tiltflow.runs.ballot import before_and_after, draw_pairs
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import dump_yaml, read_yaml, validate


def some_votes(folder: Path, count: int = 8) -> Votes:
    levels = torch.linspace(-1, 0.9, count)[:, None, None, None].expand(-1, 3, 4, 4)
    return Votes.create(folder, ("after", "before"), [f"prompt {i}" for i in range(count)], [{}] * count, [levels, -levels], 7)


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    kinds = {"Content-Type": "application/json"} if body is not None else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, kinds | headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_votes_are_blind_written_at_once_and_taken_back(tmp_path: Path) -> None:
    votes = some_votes(tmp_path / "votes")
    left = [votes.first_is_left(i) for i in range(8)]
    assert 0 < sum(left) < 8
    with serving(make_page(votes, 0)) as served:
        root = served.removesuffix("/score")
        assert json.loads(ask(f"{root}/state")[1]) == {"pair": 0, "total": 8, "prompt": "prompt 0"}
        for i, side in enumerate(("left", "right", "tie")):
            pictures = [ask(f"{root}/picture/{i}/{each}")[1] for each in ("left", "right")]
            files = [votes.picture(i, n).read_bytes() for n in (0, 1)]
            assert pictures == (files if left[i] else files[::-1])
            code, state = ask(f"{root}/vote", {"pair": i, "side": side})
            assert (code, json.loads(state)["pair"]) == (200, i + 1)
            assert Votes.open(tmp_path / "votes").choices == votes.choices  # on disk before the answer
        assert votes.choices == ["first" if left[0] else "second", "second" if left[1] else "first", "tie"]
        assert ask(f"{root}/vote", {"pair": 1, "side": "left"})[0] == 409  # of a page that is behind
        assert ask(f"{root}/vote", {"pair": 3, "side": "undo"})[0] == 200
        assert len(votes.choices) == 2
    going_on = Votes.open(tmp_path / "votes")
    assert going_on.choices == votes.choices
    with serving(make_page(going_on, 0)) as served:
        root = served.removesuffix("/score")
        for i in range(2, 8):
            ask(f"{root}/vote", {"pair": i, "side": "left"})
        assert json.loads(ask(f"{root}/state")[1]) == {"pair": 8, "total": 8, "prompt": ""}
        assert ask(f"{root}/vote", {"pair": 8, "side": "left"})[0] == 200
        assert len(going_on.choices) == 8  # there is no ninth
    wanted = torch.tensor([{"first": 1.0, "second": 0.0, "tie": 0.5}[each] for each in going_on.choices])
    assert torch.equal(going_on.outcomes(), wanted.double())
    assert going_on.pictures(0).shape == (8, 3, 4, 4)
    assert (going_on.pictures(0) + going_on.pictures(1)).abs().max() < 0.01


def test_the_share_of_the_first_and_its_interval(tmp_path: Path) -> None:
    """Wilson's interval of 8 in 10, as tables have it; a tie is half a vote for either."""
    votes = some_votes(tmp_path / "votes", 11)
    assert votes.words == "after 0, before 0, equal 0"
    choices: list[Choice] = [*7 * ["first"], "second", "tie", "tie"]
    for choice in choices:
        votes.vote(choice)
    assert votes.share() == pytest.approx((0.8, 0.490, 0.943), abs=5e-4)
    assert votes.words == "after 7, before 1, equal 2: after is chosen in 80% (95% interval 49% to 94%)"


def test_two_windows_count_a_pair_once(tmp_path: Path) -> None:
    votes, codes = some_votes(tmp_path / "votes"), list[int]()
    with serving(make_page(votes, 0)) as served:
        url = served.replace("/score", "/vote")
        threads = [threading.Thread(target=lambda: codes.append(ask(url, {"pair": 0, "side": "left"})[0])) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(codes) == [200] + [409] * 5
    assert len(votes.choices) == 1


def test_other_pages_are_not_served(tmp_path: Path) -> None:
    votes = some_votes(tmp_path / "votes")
    page = make_page(votes, 0)
    assert page.server_address[0] == "127.0.0.1"
    with serving(page) as served:
        root = served.removesuffix("/score")
        assert b"<!doctype html>" in ask(f"{root}/")[1]
        assert ask(f"{root}/state", Host="evil.example:80")[0] == 403  # a name that was made to point here
        vote = {"pair": 0, "side": "left"}
        assert ask(f"{root}/vote", vote, **{"Content-Type": "text/plain"})[0] == 403  # as a form of another site sends it
        assert ask(f"{root}/vote", vote, Host="evil.example")[0] == 403
        for body in ([], {"pair": 0}, {"pair": "0", "side": "left"}, {"pair": 0, "side": ["left"]}, "x" * 2000):
            assert ask(f"{root}/vote", body)[0] in (400, 409)
        for path in (
            "picture/9/left",
            "picture/0/first",
            "picture/-1/left",
            "../pairs.json",
            "picture/0/left/../../pairs.json",
        ):
            assert ask(f"{root}/{path}")[0] == 404
    assert votes.choices == []


def test_a_folder_that_is_damaged_is_refused(tmp_path: Path) -> None:
    votes = some_votes(tmp_path / "votes")
    votes.vote("first")
    (tmp_path / "votes" / "votes.jsonl").write_text('{"step": 0, "choice": "third"}\n')
    with pytest.raises(InputError, match="is damaged"):
        Votes.open(tmp_path / "votes")
    (tmp_path / "votes" / "pairs.json").write_text('{"names": ["a"]}')
    with pytest.raises(
        InputError, match=r"pairs\.json: .*; nothing writes it again; `tiltflow vote` with a new --output asks anew"
    ):
        Votes.open(tmp_path / "votes")
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        read_picture(tmp_path / "no.png")


def test_the_command_asks_for_votes_and_keeps_them(tmp_path: Path) -> None:
    """From the model to the page, two votes, Ctrl-C; the same command goes on at the third pair, of the same pictures."""
    command = ["vote", str(tiny_flow(tmp_path / "flow")), "itself", "-o", str(tmp_path / "votes"), "-n", "3", "--device", "cpu"]
    seen: list[Any] = []

    def visit(root: str) -> None:
        seen.append(json.loads(ask(f"{root}/state")[1])["pair"])
        seen.append(ask(f"{root}/picture/2/left"))
        for pair, side in ((0, "left"), (1, "tie")):
            ask(f"{root}/vote", {"pair": pair, "side": side})

    first, second = served_by_command(command, visit), served_by_command(command, visit)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert "0 of 3 done" in first.output
    assert "2 of 3 done" in second.output
    assert seen[0] == 0
    assert seen[2] == 2  # the votes of the second visit are of pairs that are voted on
    assert seen[1] == seen[3]
    assert seen[1][0] == 200
    votes = Votes.open(tmp_path / "votes")
    assert votes.choices == ["first" if votes.first_is_left(0) else "second", "tie"]
    assert "2 votes in" in second.output
    assert "equal 1" in second.output


@pytest.mark.slow
def test_pairs_of_a_run_before_and_after_and_of_two_samplings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"max_train_steps": 1, "train_batch_size": 4}
    run(validate(Recipe, read_yaml(tiny_recipe(tmp_path, training=training)), "recipe"), tmp_path / "run")
    tree = read_yaml(tmp_path / "run" / "recipe.yaml")  # a reward that came with the run is not even imported
    tree["reward"] = {"name": "function", "path": "evil:f"}
    (tmp_path / "run" / "recipe.yaml").write_text(dump_yaml(tree))
    (tmp_path / "run" / "evil.py").write_text("raise SystemExit\n")
    monkeypatch.chdir(tmp_path / "run")
    base, tuned = before_and_after(tmp_path / "run", "cpu")
    votes = draw_pairs(tmp_path / "a", tuned, base, ("after", "before"), count=3)
    files = [votes.picture(0, side).read_bytes() for side in (0, 1)]
    assert files[0] != files[1]
    again = draw_pairs(tmp_path / "b", tuned, base, ("after", "before"), count=3)
    assert [again.picture(0, side).read_bytes() for side in (0, 1)] == files
    itself = draw_pairs(tmp_path / "c", tuned, None, ("run", "run again"), count=3)
    assert itself.picture(0, 0).read_bytes() == files[0] != itself.picture(0, 1).read_bytes()
    with pytest.raises(InputError, match="is no training run; name a second model, or `itself`"):
        before_and_after(tiny_flow(tmp_path / "flow"), "cpu")
