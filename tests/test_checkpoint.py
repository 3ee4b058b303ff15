"""Checkpoints: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import at_each_operation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from tiltflow import tensor_file
from tiltflow.commands.terminal.app import app
from tiltflow.errors import CheckpointError
from tiltflow.runs import checkpoint
from tiltflow.runs.checkpoint import (
    FORMAT,
    MANIFEST,
    NUMBERS,
    TENSORS,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_litter,
    save_checkpoint,
    verify_checkpoint,
)
from tiltflow.streams import stream

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children do little

MUSEUM = Path(__file__).parent / "museum"


def state(step: int) -> dict[str, Any]:
    generator = stream(step, "state")
    return {
        "step": step,
        "weights": {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator, dtype=torch.float64)},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(3, 2, generator=generator)}}, "param_groups": [{"lr": 0.1 + step}]},
        "none": None,
        "flag": True,
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7, state(7))
    assert folder.name == "step-00000007"
    assert {path.name for path in folder.iterdir()} == {TENSORS, NUMBERS, MANIFEST}
    assert equal(load_checkpoint(folder), state(7))
    manifest = verify_checkpoint(folder)
    assert manifest["step"] == 7
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one file may read all
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text().filter(lambda s: ":" not in s)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers(0, 99) | st.text("abc/", max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(tree=st.dictionaries(st.text("xyz", min_size=1), trees, max_size=3))
def test_any_tree_survives(tree: dict[str, Any]) -> None:
    numbers, tensors, _ = checkpoint._split({**tree, "t": [torch.tensor([1.5])]})
    back = checkpoint._join(json.loads(json.dumps(numbers)), tensors)
    assert equal(back, {**tree, "t": [torch.tensor([1.5])]})


def test_views_of_one_storage_are_saved_as_they_are(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    folder = save_checkpoint(tmp_path, 1, {"a": whole[:3], "b": whole[3:], "c": whole.reshape(2, 3).T})
    assert equal(load_checkpoint(folder), {"a": whole[:3], "b": whole[3:], "c": whole.reshape(2, 3).T})


@pytest.mark.parametrize("dtype", tensor_file.DTYPES, ids=tensor_file.DTYPES.values())
def test_safetensors_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    """Each dtype, in shapes and layouts that are not those of a plain array."""
    x = torch.arange(-6, 6).reshape(1, 3, 2, 2).to(dtype)
    tensors = {
        "a": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.mT,
        "part": x[:, 1:],
        "number": x[0, 0, 0, 0],
        "none": x[:0],
        "same": x,
        "trained": x.clone().requires_grad_() if dtype.is_floating_point else x,
        'a "name" / ü': x,
    }
    path = tmp_path / "file.safetensors"
    size, digest = tensor_file.write_tensors(path, {**tensors, "byte": torch.tensor(1, dtype=torch.uint8)})
    assert (size, digest) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    found = load_file(path)
    assert found.pop("byte") == 1
    assert equal(found, {name: tensor.detach() for name, tensor in tensors.items()})
    with safe_open(path, "pt") as file:  # it checks offsets too
        assert set(file.keys()) == {*tensors, "byte"}


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"x: torch\.complex128 cannot be saved"):
        tensor_file.write_tensors(tmp_path / "file", {"x": torch.zeros(1, dtype=torch.complex128)})


def test_nothing_that_was_written_is_read_again_but_to_verify_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: hashed.append(path.name) or digest(path))
    save_checkpoint(tmp_path, 1, state(1))
    assert sorted(hashed) == [NUMBERS, TENSORS]


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a/b: object cannot be saved"):
        save_checkpoint(tmp_path, 1, {"a": {"b": object()}})
    assert checkpoints(tmp_path) == []


# ---- contract 1: atomic; each operation fails, or the process is killed at it ----


def test_a_disk_that_fails_at_any_operation_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        operations = at_each_operation(patch, tmp_path, lambda i: None)
        for step in (1, 2):
            save_checkpoint(tmp_path / "count", step, state(step), total_limit=1)
    total = operations() // 2
    assert total > 10
    for fatal in range(total):
        root = tmp_path / str(fatal)
        save_checkpoint(root, 1, state(1), total_limit=1)

        def fail(i: int, fatal: int = fatal) -> None:
            if i == fatal:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            at_each_operation(patch, root, fail)
            try:
                save_checkpoint(root, 2, state(2), total_limit=1)
            except CheckpointError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
        found, skipped = latest_checkpoint(root)
        assert found is not None
        assert skipped == []
        assert equal(load_checkpoint(found), state(int(found.name[-1])))


def test_a_process_killed_at_any_operation_leaves_a_checkpoint_that_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGKILL, of a child, at every operation on the disk in turn: while writing, renaming and deleting."""
    newest = []
    for fatal in range(100):
        root = tmp_path / str(fatal)
        save_checkpoint(root, 1, state(1), total_limit=1)
        child = os.fork()
        if child == 0:

            def die(i: int, fatal: int = fatal) -> None:
                if i == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

            at_each_operation(monkeypatch, root, die)
            save_checkpoint(root, 2, state(2), total_limit=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found, skipped = latest_checkpoint(root)
        assert found is not None
        assert skipped == []
        assert equal(load_checkpoint(found), state(int(found.name[-1])))
        newest.append(int(found.name[-1]))
        remove_litter(root)
        assert [path.name for path in root.glob("*tmp*")] == []
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(newest) > 10
    assert newest == sorted(newest)  # before the rename the old one, after it the new one
    assert set(newest) == {1, 2}


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush, rename = os.fsync, os.rename

    def flushed(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    def renamed(source: Path, to: Path) -> None:
        order.append("rename")
        rename(source, to)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    save_checkpoint(tmp_path, 1, state(1))
    draft = order[3]
    assert order == [TENSORS, NUMBERS, MANIFEST, draft, "rename", tmp_path.name]
    assert draft.startswith("step-00000001.tmp-")


def test_a_folder_is_never_written_to_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is moved aside, and kept until the new one is known to be good."""
    save_checkpoint(tmp_path, 1, state(1))
    seen: list[bool] = []
    verify = checkpoint.verify_checkpoint

    def verified(folder: Path) -> dict[str, Any]:
        (aside,) = tmp_path.glob("*.old-*")
        patch.undo()
        seen.append(equal(load_checkpoint(aside), state(1)))
        return verify(folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify_checkpoint", verified)
        save_checkpoint(tmp_path, 1, state(2))
    assert seen == [True]
    assert equal(load_checkpoint(tmp_path / "step-00000001"), state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# ---- contract 2: verified load and retention ----


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit in a tensor": lambda folder: flip(folder / TENSORS),
    "a flipped bit in the header": lambda folder: flip(folder / TENSORS, 12),
    "a flipped bit in the numbers": lambda folder: flip(folder / NUMBERS, 5),
    "a truncated file": lambda folder: os.truncate(folder / TENSORS, 40),
    "a missing file": lambda folder: (folder / NUMBERS).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 60),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text("{}"),
    "a manifest that is a list": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "a manifest without end": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_named(what: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step))
    DAMAGE[what](tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_checkpoint(tmp_path / "step-00000002")
    found, skipped = latest_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]
    assert equal(load_checkpoint(found), state(1))


def test_a_checkpoint_of_a_later_version_is_a_clear_error(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step))
    path = tmp_path / "step-00000002" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1, "tiltflow": "9.0"}))
    with pytest.raises(CheckpointError, match=rf"has format {FORMAT + 1}, this tiltflow .* it was written by tiltflow 9.0"):
        latest_checkpoint(tmp_path)
    assert equal(load_checkpoint(tmp_path / "step-00000001"), state(1))


def test_retention_keeps_the_newest_and_deletes_after_the_new_one_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, state(step), total_limit=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    save_checkpoint(tmp_path, 11, state(11), total_limit=None)
    assert len(checkpoints(tmp_path)) == 3

    def damaged(folder: Path) -> None:
        raise CheckpointError("the disk returned something else")

    monkeypatch.setattr(checkpoint, "verify_checkpoint", damaged)
    with pytest.raises(CheckpointError, match="something else"):
        save_checkpoint(tmp_path, 12, state(12), total_limit=1)
    assert {"step-00000003", "step-00000010", "step-00000011"} <= {folder.name for folder in checkpoints(tmp_path)}


def test_a_full_disk_and_a_read_only_folder_are_clear_errors(tmp_path: Path) -> None:
    import resource

    save_checkpoint(tmp_path, 1, state(1))
    child = os.fork()
    if child == 0:  # the limit on the size of a file stays with the child
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        try:
            save_checkpoint(tmp_path, 2, state(2))
        except CheckpointError as error:
            os._exit(42 if "cannot be written" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert latest_checkpoint(tmp_path) == (tmp_path / "step-00000001", [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]

    if os.geteuid() == 0:
        return  # root may write anywhere
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            save_checkpoint(tmp_path, 3, state(3))
    finally:
        tmp_path.chmod(stat.S_IRWXU)
    assert latest_checkpoint(tmp_path) == (tmp_path / "step-00000001", [])


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file", 1, state(1))


# ---- contract 14: the museum ----


@pytest.mark.parametrize("folder", sorted(MUSEUM.glob("step-*")), ids=lambda folder: folder.name)
def test_old_checkpoints_load_for_ever(folder: Path) -> None:
    found = load_checkpoint(folder)
    assert found["step"] == int(folder.name[5:])
    assert found["weights"]["a"].tolist() == [[0.5, -1.25], [3.0, 0.0]]
    assert found["optimizer"]["state"][0]["exp_avg"].dtype == torch.float64


# ---- the command ----


def test_verify_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, state(step))
    runner = CliRunner()
    good = runner.invoke(app, ["verify-checkpoint", str(tmp_path), "--json"])
    assert good.exit_code == 0
    assert [entry["good"] for entry in json.loads(good.stdout.splitlines()[-1])["checkpoints"]] == [True, True]
    flip(tmp_path / "checkpoints" / "step-00000002" / TENSORS)
    bad = runner.invoke(app, ["verify-checkpoint", str(tmp_path)])
    assert bad.exit_code == 1
    assert "good step-00000001" in bad.output
    assert "is not what was written" in bad.output
    assert runner.invoke(app, ["verify-checkpoint", str(tmp_path / "checkpoints" / "step-00000001")]).exit_code == 0


def test_a_checkpoint_that_is_deleted_while_it_is_verified_is_not_called_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes a newer one, and keeps only the last, in the middle of reading the first."""
    save_checkpoint(tmp_path / "checkpoints", 1, state(1))
    digest, root = checkpoint._sha256, tmp_path / "checkpoints"

    def meanwhile(path: Path) -> str:
        if path.parent.name == "step-00000001" and not (root / "step-00000002").exists():
            save_checkpoint(root, 2, state(2), total_limit=1)
        return digest(path)

    monkeypatch.setattr(checkpoint, "_sha256", meanwhile)
    result = CliRunner().invoke(app, ["verify-checkpoint", str(tmp_path), "--json"])
    assert result.exit_code == 0
    assert "gone step-00000001: deleted meanwhile" in result.output
    assert "bad" not in result.output
    assert json.loads(result.stdout.splitlines()[-1])["checkpoints"] == []
