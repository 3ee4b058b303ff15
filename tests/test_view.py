"""The page of `tiltflow view`: what it serves, to whom, and of which folders."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from PIL import Image
from test_report import SUMMARY, Balanced, words, write

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.evaluation.samples import Asked
from tiltflow.files import write_rows
from tiltflow.reports import plots
from tiltflow.reports.description import describe
from tiltflow.runs.evaluate import cells_of, pictures_of
from tiltflow.training.records import known_records
from tiltflow.view import growing, page
from tiltflow.view.places import Place, Places
from tiltflow.view.request import View
from tiltflow.view.server import make_server


@contextmanager
def served(*folders: Path) -> Iterator[int]:
    """The port of the page of folders."""
    server = make_server(View(Places(folders)), 0)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(port: int, path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, str]:
    """The status and the text of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"} | headers if text else headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps; it is not changed."""
    folder = tmp_path_factory.mktemp("written") / "even"
    write(folder, SUMMARY)
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(written, tmp_path / "even"))


def records(*values: float | None) -> list[dict[str, Any]]:
    rows = [{"step": i + 1, "seconds": 0.5 * i, "network_evaluations": 10 * i, "reward": x} for i, x in enumerate(values)]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def test_a_run_is_described_by_its_curves() -> None:
    looks = [
        {"step": 0, "measures": {"reward": [0.0, 0.1]}, "alarm": None, "target": {"reward": [2.0, 0.2]}},
        {"step": 2, "measures": {"reward": [1.0, 0.1], "variance": [3.0, 0.5]}, "alarm": "step 2: fell"},
    ]
    known = describe({"reward_target": 2.5, "best_step": 2}, records(1, None, 3.123456), looks, name="even")
    reward = known["curves"]["reward"]
    assert (reward["title"], reward["values"], reward["target"]) == ("Reward", [1, None, 3.1235], 2.5)
    assert "spread" not in reward
    assert known["axes"] == {"step": [1, 2, 3], "seconds": [0, 0.5, 1], "network_evaluations": [0, 10, 20]}
    assert known["looks"]["measures"]["variance"]["values"] == [None, 3]
    assert known["looks"]["measures"]["reward"] == {
        "title": "Reward", "values": [0, 1], "errors": [0.1, 0.1], "target": 2,
    }  # fmt: skip
    assert (known["looks"]["alarm"], known["looks"]["best"]) == (2, 2)
    json.dumps(known, allow_nan=False)
    assert describe({}, [], [], name="new")["curves"] == {}


def test_a_long_curve_is_of_means_and_only_what_is_new_is_sent() -> None:
    many = records(*map(float, range(1, 11)))
    few = describe({}, many, [], name="even", most_points=4)
    assert few["steps_per_point"] == 3
    assert few["axes"]["step"] == [3, 6, 9, 10]
    assert few["curves"]["reward"]["values"] == [2, 5, 8, 10]
    new = describe({}, many, [], name="even", most_points=None, after=8)
    assert new["axes"]["step"] == [9, 10]
    assert new["curves"]["reward"]["values"] == [9, 10]


def test_the_page_of_a_run_is_its_report(run: Path) -> None:
    with served(run) as port:
        status, page = ask(port, "/")
    assert status == 200
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert all(source.startswith(("data:", "#")) for source in parser.sources)
    report = words((run / "report.html").read_text())
    assert set(report.split()) <= set(words(page).split())


def test_only_the_scripts_of_the_page_are_run(run: Path) -> None:
    """By the server's policy: a word that is another for each page, and that a script in a run cannot know."""
    with served(run) as port:
        known = set()
        for _ in range(2):
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/")
            answer = connection.getresponse()
            policy, page = answer.getheader("Content-Security-Policy") or "", answer.read().decode()
            connection.close()
            nonce = re.search(r"script-src 'nonce-([\w-]{20,})'", policy)
            assert nonce is not None
            assert "default-src 'none'" in policy
            assert page.count(f'<script nonce="{nonce[1]}">') == page.count("<script") - 1  # the data are no script
            known.add(nonce[1])
    assert len(known) == 2


def test_a_growing_run_is_asked_for_what_is_new(run: Path) -> None:
    with served(run) as port:
        whole, new, less = (json.loads(ask(port, f"/api/run?at=even&after={step}")[1]) for step in (0, 2, 9))
        assert whole["curves"]["loss"]["values"] == [1, 0.5, 0.33333]
        assert (new["from"], new["axes"]["step"], new["curves"]["loss"]["values"]) == (2, [3], [0.33333])
        assert (less["from"], less["axes"]["step"]) == (0, [1, 2, 3])  # it was resumed from an earlier step
        html = json.loads(ask(port, "/api/report?at=even")[1])["html"]
        assert "<h2>Tests</h2>" in html
        assert "<html" not in html
        (run / "summary.json").unlink()
        assert json.loads(ask(port, "/api/run?at=even&after=3")[1])["stamp"] != whole["stamp"]
        assert "even was stopped, 3 iterations so far" in words(ask(port, "/")[1])


def test_what_grows_is_read_once_and_is_what_all_of_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is appended: lines that are damaged or not at their end, metrics that begin late, a run that begins again."""
    monkeypatch.setattr(growing, "RECENT", 6)
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    run = Place("run", path.parent, "run")

    def line(step: int, **more: float) -> str:
        row = {"step": step, "seconds": step, "network_evaluations": step, "reward": step / 2, "loss": 0} | more
        return json.dumps(row) + "\n"

    def look(after: int, lines: int) -> None:
        """What is new since a step, of which so many lines have to be read."""
        count, take = [0], growing.take_row

        def counted(*arguments: Any) -> bool:
            count[0] += 1
            return take(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(growing, "take_row", counted)
            found = page.run_data(run, after)
        rows = known_records(path.parent)[0]
        start = after if rows[-1]["step"] >= after and found["from"] else 0
        expected = describe({}, rows, [], name="run", most_points=None, after=start)
        assert {key: found[key] for key in ("axes", "curves")} == {key: expected[key] for key in ("axes", "curves")}
        assert found["from"] == start
        assert count[0] == lines

    path.write_text("".join(line(step) for step in range(1, 11)))
    look(10, 10)
    look(10, 0)
    with path.open("a") as file:
        for text, lines in (
            (line(11), 1),
            (line(12)[:9], 0),
            (line(12)[9:] + "{damaged}\n" + line(14, loss=2.0), 3),
            (line(15, reward=float("nan")), 1),
            (line(2) + line(99) + line(16), 3),
        ):
            file.write(text)
            file.flush()
            look(10, lines)
    look(14, 0)
    look(16, 0)
    assert page.run_data(run, 3)["from"] == 0  # not kept: all of it
    write_rows(path, [json.loads(line(step)) for step in range(1, 6)])  # resumed from an earlier step
    look(16, 5)
    look(5, 0)
    path.write_text("".join(line(step, reward=7) for step in range(1, 30)))  # in its place, and longer
    look(25, 29)
    again = path.read_bytes().replace(b'"reward": 7, "loss": 0', b'"reward": 8, "loss": 0', 27)
    path.with_name("new").write_bytes(again)
    path.with_name("new").replace(path)  # another file that ends as the one before
    look(25, 29)
    path.unlink()
    assert page.run_data(run, 5)["axes"]["step"] == []


@pytest.mark.parametrize(
    "key", ["../secret", "even/../../secret", "secret", "even/model", "/etc", "even/..", "even/link", "%2e%2e"]
)
def test_a_key_leads_to_nothing_that_was_not_named(run: Path, key: str) -> None:
    write(run.parent / "secret", SUMMARY | {"name": "hidden"})
    (run / "link").symlink_to(run.parent / "secret")
    with served(run) as port:
        for path in ("/", "/api/run", "/api/report"):
            status, text = ask(port, f"{path}?at={key}")
            assert (status, "hidden" in text) == (404, False)


def test_requests_that_are_refused(run: Path) -> None:
    with served(run) as port:
        for path in ("/x", "/api/", "/api/none", "/../secret", "/summary.json", "/even/summary.json", "//even"):
            assert ask(port, path)[0] == 404
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example:80", ""):
            assert ask(port, "/", Host=host)[0] == 403
            assert ask(port, "/api/run?at=even", "POST", {}, Host=host)[0] == 403
        assert ask(port, "/", Host=f"localhost:{port}")[0] == 200
        assert ask(port, "/api/run?at=even", "POST", {})[0] == 404  # that is a GET
        assert ask(port, "/api/run", "POST", {}, **{"Content-Type": "text/plain"})[0] == 403
        for length in ("-1", "x", str(1 << 21)):
            assert ask(port, "/api/run", "POST", {}, **{"Content-Length": length})[0] == 400
        for method in ("PUT", "DELETE", "OPTIONS"):
            assert ask(port, "/", method)[0] == 501


def test_a_run_that_is_deleted_while_it_is_looked_at_is_said_so_in_one_line(run: Path) -> None:
    with served(run) as port:
        run.rename(run.parent / "moved")
        status, text = ask(port, "/api/run?at=even")
    assert status == 404
    assert json.loads(text) == {"error": "even: is not there any more, or is no run"}


def test_folders_that_hold_nothing_to_look_at_are_refused(tmp_path: Path, run: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, why in (("empty", "holds no run"), ("file", "is not a folder"), ("none", "there is no such folder")):
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / name}: {why}")):
            Places([run, tmp_path / name])
    with served(run) as port, pytest.raises(InputError, match=f"--port {port}: Address already in use"):
        make_server(View(Places([run])), port)


def several(folder: Path) -> Path:
    """A folder of a run, a sweep of two points, of which one is being trained, a comparison and stages."""
    folder.mkdir()
    write(folder / "even", SUMMARY)
    for other in ("sweep/beta=1", "sweep/beta=2.partial", "stages", "stages/stage-01"):
        shutil.copytree(folder / "even", folder / other)
    (folder / "sweep" / "beta=2.partial" / "summary.json").unlink()
    values = {"reward_base": 0.0, "reward_tuned": 3.0, "w2_base": 0.5, "w2_floor": 0.1, "vendi_base": 4.0}
    measured = {f"{key}{end}": value if not end else 0.1 for key, value in values.items() for end in ("", "_std", "_error")}
    points = [
        {"beta": 1, "runs": 1, **measured, "on_front": True},
        {"beta": 2, "runs": 0, "error": "step 3: <nan>"},
    ]
    (folder / "sweep" / "sweep.yaml").write_text("recipe: {}\nover: {method.beta: [1, 2]}\n")
    (folder / "sweep" / "sweep.json").write_text(json.dumps({"distance": "w2_base", "runs": [], "points": points, "table": []}))
    row = {"stage": 1, "folder": "stage-01", "path_kl": None, "seconds": 61.0, "stopped": None}
    row |= {name: value for key in ("before", "after", "rise") for name, value in ((key, 1.0), (f"{key}_error", 0.1))}
    settings = {"method": {"name": "adjoint-matching"}, "base": "first", "seed": 0, "utility": {"name": "<entropy>"}}
    (folder / "stages" / "stages.json").write_text(json.dumps({"settings": settings, "stages": [row]}))
    (folder / "compare").mkdir()
    (folder / "compare" / "compare.yaml").write_text("{}")
    return folder


def test_several_runs_are_on_one_page(tmp_path: Path) -> None:
    folder = several(tmp_path / "runs")
    with served(folder) as port:
        page = ask(port, "/")[1]
        links = list(dict.fromkeys(re.findall(r'href="/\?at=([^"]*)"', page)))
        assert links == ["runs%2Fcompare", "runs%2Fstages", "runs%2Fsweep", "runs%2Feven"]
        assert {run["key"] for run in json.loads(ask(port, "/api/place?at=runs")[1])["runs"]} == {"runs/even"}
        for link in links:
            status, other = ask(port, f"/?at={link}")
            assert status == 200
            parser = Balanced()
            parser.feed(other)
            assert parser.open == []
        row = re.search(r"<tr>\s*<th scope=row>.*?even.*?</tr>", page, re.S)
        assert row is not None
        assert [float(value) for value in re.findall(r'data-value="([^"]*)"', row[0])] == [
            -0.4, 3.25, 0.0625, 0.03, 0.8, 0.9, 3, 3,
        ]  # fmt: skip


def test_a_sweep_has_a_row_for_each_point_and_a_link_to_each_run(tmp_path: Path) -> None:
    folder = several(tmp_path / "runs")
    with served(folder / "sweep", folder / "even") as port:
        page = ask(port, "/?at=sweep")[1]
        shown = words(page)
        assert "1 of 2 points done" in shown
        assert "beta = 2: step 3: &lt;nan&gt;" in shown
        assert "W2 to the base (dashed" in shown
        assert "3.00 ± 0.10" in shown
        assert re.findall(r'href="/\?at=([^"]*)"', page)[:2] == ["sweep%2Fbeta%3D1", "sweep%2Fbeta%3D2"]
        status, of_point = ask(port, "/?at=sweep/beta%3D2")
        assert status == 200
        assert "beta=2 was stopped, 3 iterations so far" in words(of_point)
        (folder / "sweep" / "beta=2.partial").rename(folder / "sweep" / "beta=2")  # as when it is done
        assert ask(port, "/?at=sweep/beta%3D2")[0] == 200
        status, both = ask(port, "/")  # of both that were named
        assert status == 200
        assert "sweep, even" in words(both)


def test_stages_link_to_their_runs_and_an_unfinished_comparison_says_so(tmp_path: Path) -> None:
    folder = several(tmp_path / "runs")
    with served(folder) as port:
        page = ask(port, "/?at=runs/stages")[1]
        assert 'href="/?at=runs%2Fstages%2Fstage-01"' in page
        assert "&lt;entropy&gt;" in page
        assert "comparison.json" in words(ask(port, "/?at=runs/compare")[1])


@pytest.mark.slow
def test_the_command_prints_an_address_and_ends_by_ctrl_c(run: Path) -> None:
    command = [sys.executable, "-m", "tiltflow", "view", str(run), "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert port is not None, line + process.stderr.read()
        assert ask(int(port[1]), "/")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    wrong = subprocess.run([*command[:4], str(run.parent / "none"), *command[5:]], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "there is no such folder" in wrong.stderr


@pytest.mark.parametrize("kind", ["samples", "classes", "prompts"])
def test_the_rewards_of_the_summary_are_in_the_order_of_the_pictures(tmp_path: Path, kind: str) -> None:
    """Each sample is a grey whose reward is that grey: cut out of the picture that is written, it is what is listed for it."""
    asked = {
        "samples": Asked.of_samples(12),
        "classes": Asked.of_classes([Item("a"), Item("b"), Item("c")], 12),
        "prompts": Asked.of_prompts([Item("a"), Item("b"), Item("c")], 4),
    }[kind]
    greys = torch.linspace(-1, 1, 12)
    x = greys.reshape(12, 1, 1, 1).expand(12, 1, 4, 4)
    files, about = pictures_of(x, x.flip(0), asked, 9, None)
    about |= cells_of(x, (greys, greys.flip(0)), asked, 9)
    for side in ("before", "after"):
        files[f"{side}.png"](tmp_path / f"{side}.png")
        with Image.open(tmp_path / f"{side}.png") as picture:
            rows = [plots.row_cells(row, about["columns"]) for row in plots.grid_rows(picture, about["rows"])]
        seen = [cell.convert("L").getpixel((4, 4)) / 127.5 - 1 for row in rows for cell in row]
        known = about["rewards"][side]
        assert len(known) == 9
        assert seen[:9] == pytest.approx(known, abs=0.01)
