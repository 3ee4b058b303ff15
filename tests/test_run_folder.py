"""The folder of a run: whatever fails while it is written is one line, and the run goes on or begins anew; whatever is damaged
in it is read as far as it is good, or refused in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from disk import at_each_operation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile import damaged, harm, only_our_errors
from test_resume import resuming
from tiny import tiny_recipe
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app
from tiltflow.errors import CheckpointError, InputError, Note, OutputError, TiltflowError
from tiltflow.evaluation.monitor import LOOKS, read_looks
from tiltflow.files import LITTER, check_output, repair, write_folder
from tiltflow.models.model import load
from tiltflow.pretraining.recipe import read_pretraining
from tiltflow.pretraining.run import run_pretraining
from tiltflow.reports.report import write_report
from tiltflow.runs.checkpoint import FOLDER
from tiltflow.runs.fingerprints import FILE as FINGERPRINTS
from tiltflow.runs.fingerprints import read_fingerprints
from tiltflow.runs.lock import HOLDER, Holder, working_in
from tiltflow.runs.looks import of_monitor
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import read_run, run
from tiltflow.runs.run_files import RECIPE, read_records
from tiltflow.runs.sweep import Point, collect, sweep
from tiltflow.settings import read_yaml, validate
from tiltflow.training.records import METRICS
from tiltflow.training.trainer import Record

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children do little


def write(name: str) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        for i in range(2):
            (folder / f"{name} {i}").write_text(name)

    return into


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- a folder is whole, the old one or the new one ----


def test_a_disk_that_fails_at_any_operation_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fatal in range(100):
        root = tmp_path / str(fatal)
        root.mkdir()
        write_folder(root / "model", write("old"))

        def fail(i: int, fatal: int = fatal) -> None:
            if i == fatal:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            operations = at_each_operation(patch, root, fail)
            try:
                write_folder(root / "model", write("new"))
                told = False
            except OutputError as error:
                assert str(error) == f"{root / 'model'}: cannot be written (No space left on device)"  # noqa: PT017
                told = True
        kept = names(root / "model")
        assert kept in ({"old 0", "old 1"}, {"new 0", "new 1"})
        assert told or kept == {"new 0", "new 1"}
        if operations() <= fatal:
            break
    assert fatal > 8


def test_a_process_killed_at_any_operation_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for fatal in range(100):
        root = tmp_path / str(fatal)
        root.mkdir()
        write_folder(root / "model", write("old"))
        status = killed(monkeypatch, root, fatal, lambda root=root: write_folder(root / "model", write("new")))
        repair(root)
        assert names(root) == {"model"}
        found.append(names(root / "model"))
        if os.WIFEXITED(status):
            break
    assert len(found) > 8
    assert found[0] == {"old 0", "old 1"}
    assert found[-1] == {"new 0", "new 1"}
    assert sorted(found, key=lambda kept: "new 0" in kept) == found  # once it is the new one, it stays that


def killed(monkeypatch: pytest.MonkeyPatch, folder: Path, fatal: int, work: Callable[[], object]) -> int:
    """How a child ended that works until it is killed, by a real SIGKILL, before an operation on the disk."""
    child = os.fork()
    if child == 0:

        def die(i: int) -> None:
            if i == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        at_each_operation(monkeypatch, folder, die)
        work()
        os._exit(0)
    status: int = os.waitpid(child, 0)[1]
    return status


# ---- a run ----


def recipe_in(folder: Path) -> Recipe:
    """Two steps, a checkpoint and a look after each; a base that is copied."""
    path = tiny_recipe(
        folder,
        method={"name": "adjoint-matching", "num_inference_steps": 2, "num_passes": 1},
        optimizer={"lr_scheduler": "constant"},
        training={
            "max_train_steps": 2,
            "train_batch_size": 2,
            "checkpointing_steps": 1,
            "checkpoints_total_limit": 1,
            "monitor": {"steps": 1, "num_samples": 8},
        },
        evaluation={"num_samples": 4, "grid": 4},
        sampling={"num_inference_steps": 2},
    )
    return validate(Recipe, read_yaml(path), "recipe")


def check_whole(folder: Path, whole: Path) -> None:
    """Everything that a run makes, and nothing else."""
    assert names(folder) == names(whole)
    assert not [name for name in names(folder) if LITTER.fullmatch(name)]
    found = names(folder / FOLDER)
    assert found - {"step-00000001"} == names(whole / FOLDER)  # the old one may have been about to be deleted
    for name in ("model/model.safetensors", "best/model.safetensors", "base/model.safetensors", "recipe.yaml", "monitor.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_operation_goes_on_or_begins_anew(
    stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first folder that is made to the last: base, recipe, metrics, checkpoints, best and tuned model."""
    recipe = recipe_in(tmp_path)
    with monkeypatch.context() as patch:
        operations = at_each_operation(patch, tmp_path / "whole", lambda i: None)
        run(recipe, tmp_path / "whole")
    assert operations() > 80
    for fatal in range(stride // 2, operations(), stride):
        folder = tmp_path / f"killed-{fatal}"
        status = killed(monkeypatch, folder, fatal, lambda folder=folder: run(recipe, folder))
        assert os.WIFSIGNALED(status), fatal
        run(resuming(recipe), folder)
        check_whole(folder, tmp_path / "whole")


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_fails_at_any_operation_of_a_run_is_one_line(
    stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path)
    with monkeypatch.context() as patch:
        operations = at_each_operation(patch, tmp_path / "whole", lambda i: None)
        run(recipe, tmp_path / "whole")
    for fatal in range(stride // 2, operations(), stride):
        folder = tmp_path / f"failed-{fatal}"

        def fail(i: int, fatal: int = fatal) -> None:
            if i >= fatal:  # a disk that is full stays so
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            at_each_operation(patch, folder, fail)
            try:
                run(recipe, folder)
            except TiltflowError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
        run(resuming(recipe), folder)
        check_whole(folder, tmp_path / "whole")


# ---- what can be found before the first step, is ----


def impossible(folder: Path) -> dict[str, Path]:
    """Paths at which no folder can be made."""
    (folder / "file").write_text("")
    (folder / "dangling").symlink_to(folder / "nowhere" / "else")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "a file": folder / "file",
        "below a file": folder / "file" / "run",
        "too long": folder / ("x" * 300),
        "a dangling link": folder / "dangling",
        "a link to itself": folder / "loop" / "run",
        "not on a disk": Path("/proc/x"),
        "no character of a path": folder / "a\0b",
    }


def test_an_output_that_cannot_be_is_one_line_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, tree = recipe_in(tmp_path), read_yaml(tmp_path / "recipe.yaml")
    flow = tmp_path / "flow.yaml"
    flow.write_text("task: flow\nnetwork: unet\n")

    def loaded(*arguments: object, **options: object) -> None:
        raise AssertionError("something was loaded")

    for name in (
        "tiltflow.models.sources.network.load",
        "tiltflow.pretraining.images.load_images",
        "tiltflow.runs.sweep.run_point",
    ):
        monkeypatch.setattr(name, loaded)
    attempts: list[Callable[[Path], object]] = [
        lambda output: run(recipe, output),
        lambda output: sweep(tree, {"seed": [0, 1]}, output),
        lambda output: run_pretraining(read_pretraining(str(flow), []), tmp_path / "data.npz", output, name="flow"),
        lambda output: check_output(output / "samples.png"),  # of `sample`
    ]
    for what, output in impossible(tmp_path).items():
        for attempt in attempts:
            with pytest.raises(InputError, match=r"cannot be (made|written)") as error:
                attempt(output)
            assert "\n" not in str(error.value), what
    assert (tmp_path / "file").read_text() == ""


def test_sample_finds_out_before_it_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltflow.models.model.Model.sample", lambda *arguments, **options: pytest.fail("sampled"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for output in (tmp_path / "file" / "x.png", tmp_path / "folder.png", tmp_path / f"{'x' * 300}.npz"):
        result = CliRunner().invoke(app, ["sample", "digits-flow", "-n", "1", "-o", str(output)])
        assert isinstance(result.exception, InputError)
        assert str(result.exception).startswith(f"--output {output}: cannot be written (")


def test_too_little_room_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of 8 x 8 pictures, a checkpoint of its weights, their two moments, and the model: four times its weights, and the
    copy of the base."""
    recipe = recipe_in(tmp_path)
    weights = (tmp_path / "flow" / "model.safetensors").stat().st_size
    for free, enough in ((3 * weights, False), (10 * weights, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if enough:
            monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {"iterations": 0})
            run(recipe, tmp_path / "run")
        else:
            with pytest.raises(InputError, match=r"the disk has .* left, and the run needs at least .*"):
                run(recipe, tmp_path / "run")
            assert not (tmp_path / "run").exists()


def test_a_limit_on_the_size_of_files_is_found_before_the_first_step(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    child = os.fork()
    if child == 0:  # the limit stays with the child
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            run(recipe, tmp_path / "run")
        except InputError as error:
            os._exit(42 if "no file may be larger than 0.0 MB (ulimit -f)" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert not (tmp_path / "run").exists()


def test_a_folder_that_may_not_be_written_to_is_one_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o555)
    for output in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(InputError, match="Permission denied"), working_in(output):
            pass


def test_the_last_save_does_not_hide_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, notes = recipe_in(tmp_path), list[str]()
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"monitor": None})})

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    def watch(record: Record) -> None:
        monkeypatch.setattr(os, "mkdir", full)

    with pytest.raises(CheckpointError, match=r"step-00000001: the checkpoint cannot be written \(No space left"):
        run(recipe, tmp_path / "run", callbacks=[watch], note=notes.append)
    assert notes == [f"{tmp_path / 'run' / 'model'}: cannot be written (No space left on device)"]


# ---- what is damaged ----

NULS = b"\0" * 512 + b"\n"
"""What a power cut can leave of a file that had grown, but was not yet written."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with its evaluation; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run(recipe_in(folder), folder / "run")
    return folder


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", ["metrics.jsonl", "monitor.jsonl"])
@pytest.mark.parametrize("what", ["nuls", "no json", "half a line", "another type", "twice", "empty", "gone", "all nuls"])
def test_a_damaged_log_does_not_keep_a_run_from_going_on(what: str, name: str, finished: Path, tmp_path: Path) -> None:
    """The checkpoint beside it is good: what is lost is said, and the last line has what a report needs."""
    shutil.copytree(finished / "run", tmp_path / "run")
    path, notes = tmp_path / "run" / name, list[str]()
    lines = path.read_bytes().splitlines(keepends=True)
    last = lines[-1]
    content = {
        "nuls": b"".join(lines[:-1]) + NULS,
        "no json": b"".join(lines[:-1]) + b"{]\n",
        "half a line": b"".join(lines[:-1]) + last[:20],
        "another type": b"".join(lines[:-1]) + b'{"step": "2"}\n[2]\n3\n{"step": 2, "measures": 4, "alarm": 5}\n',
        "twice": b"".join(lines) + lines[0],
        "empty": b"",
        "all nuls": NULS,
    }
    path.unlink() if what == "gone" else path.write_bytes(content[what])
    recipe = validate(Recipe, read_yaml(finished / "recipe.yaml"), "recipe")
    run(resuming(recipe), tmp_path / "run", note=notes.append)
    rows = read_records(tmp_path / "run")
    assert rows[-1]["step"] == 2
    assert rows[-1]["network_evaluations"] == read_records(finished / "run")[-1]["network_evaluations"]
    assert read_looks(tmp_path / "run")[0] == read_looks(finished / "run")[0]
    lost = name == "metrics.jsonl" and what != "twice"
    assert any("metrics.jsonl: the metrics of" in note for note in notes) == lost


def test_damaged_lines_are_left_out_and_counted(finished: Path, tmp_path: Path) -> None:
    good = [f'{{"step": {i}, "seconds": 1, "network_evaluations": {i}}}\n' for i in range(1, 7)]
    path = tmp_path / METRICS
    path.write_text("".join([*good[:2], NULS.decode(), *good[3:]]) + '{"step": 7, "sec')
    with pytest.warns(Note, match=r"metrics.jsonl: 1 lines are damaged"):
        assert [row["step"] for row in read_records(tmp_path)] == [1, 2, 4, 5, 6]
    path.write_text("".join([*good[:2], good[2].replace("3", "900", 1), *good[3:5], good[5].replace("6", "1", 1)]))
    with pytest.warns(Note, match=r"metrics.jsonl: 2 lines are damaged"):
        assert [row["step"] for row in read_records(tmp_path)] == [1, 2, 4, 5]
    path.write_bytes(NULS)
    with pytest.raises(InputError, match="holds no step of a training run"):
        read_records(tmp_path)


READ: dict[str, Callable[[Path], object]] = {
    METRICS: read_records,
    LOOKS: of_monitor,
    "summary.json": lambda run: (
        write_report(run),
        collect([Point("run", {"seed": 0}, Recipe.model_construct())], run.parent, {}),
    ),
    RECIPE: read_run,
    HOLDER: lambda run: Holder.read(run / HOLDER),
    FINGERPRINTS: read_fingerprints,
    "model/config.json": load,
    "base/config.json": lambda run: load(run / "base"),
}


def damage_and_read(
    name: str, finished: Path, folder: Path, cut: int, flips: list[tuple[int, int]], zeros: int, *, report: bool
) -> None:
    source = finished / "run"
    for path in source.rglob("*"):
        if path.is_file() and path.name != "state.safetensors":
            to = folder / "run" / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    (folder / "run" / HOLDER).write_text(json.dumps(asdict(Holder.this())))
    path = folder / "run" / name
    content = damaged(path.read_bytes(), cut, flips)
    path.write_bytes(content[: len(content) - zeros] + b"\0" * zeros)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        only_our_errors(lambda: READ[name](folder / "run"))
        if report:
            only_our_errors(lambda: write_report(folder / "run"))


cases = {**harm, "zeros": st.integers(0, 300) | st.just(0)}


@pytest.mark.parametrize("name", READ)
def test_any_damage_to_a_file_of_a_run_is_found_or_harmless(
    name: str, finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")

    @settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
    @given(**cases)
    def check(cut: int, flips: list[tuple[int, int]], zeros: int) -> None:
        damage_and_read(name, finished, folder, cut, flips, zeros, report=False)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_any_damage_to_a_file_of_a_run_is_found_or_harmless_fuzz(
    name: str, finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")

    @settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
    @given(**cases)
    def check(cut: int, flips: list[tuple[int, int]], zeros: int) -> None:
        damage_and_read(name, finished, folder, cut, flips, zeros, report=name in (METRICS, LOOKS, "summary.json"))

    check()
