"""Input that was made to do damage: refused in one line, nothing run, nothing written elsewhere, nothing without end."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import call
from test_http_reward import npy, npy_header, png, raw_answers
from tiny import UNET, tiny_flow, tiny_recipe
from torch import Tensor
from typer.testing import CliRunner

import tiltflow.commands.terminal.app
from tiltflow.conditions.prompts import Prompts, read_prompts
from tiltflow.data import load_captioned, load_images
from tiltflow.errors import CheckpointError, InputError, TiltflowError
from tiltflow.models.model import load
from tiltflow.plugins import allow_code, code_allowed, import_function
from tiltflow.rewards.functions.prompted import given as told
from tiltflow.rewards.http import Http
from tiltflow.rewards.serving.request import BadRequestError, read_request
from tiltflow.runs.checkpoint import FOLDER, MANIFEST, NUMBERS, TENSORS, load_checkpoint, save_checkpoint
from tiltflow.runs.export import export_run
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import evaluate_run, load_text_to_image, run
from tiltflow.runs.sweep import parse_grid
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import apply_overrides, dump_yaml, parse_yaml, read_yaml, validate
from tiltflow.tensor_file import read_tensors

FEW = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
MANY = settings(deadline=None, max_examples=3000, suppress_health_check=list(HealthCheck))


class Payload:
    """What a pickle does when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


# ---- pickles ----


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    torch.save({"weight": Payload(mark)}, tmp_path / "weights.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload(mark)))
    for name in ("weights.pt", "raw.pt"):
        with pytest.raises(InputError, match=r"is refused|cannot be read"):
            read_tensors(tmp_path / name, "reward.model")
    images = np.array([Payload(mark)] * 4, dtype=object)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=np.zeros(4), names=images, images=images)
    for read in (load_images, load_captioned):
        with pytest.raises(InputError, match=r"not a readable .npz file"):
            read(tmp_path / "data.npz")
    folder = tiny_flow(tmp_path / "flow")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(InputError, match="the weights cannot be read"):
        load(folder)
    assert not mark.exists()


def test_no_module_opens_pickles() -> None:
    """torch.load with weights_only, np.load without pickles, no pickle, eval or exec anywhere."""
    import tiltflow

    for path in Path(tiltflow.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in (
            "import pickle",
            "eval(",
            "exec(",
            "yaml.load(",
            "yaml.unsafe",
            "trust_remote_code=True",
            "os.system",
            "shell=True",
        ):
            assert word not in text.replace(".eval()", ""), f"{path}: {word}"
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{path}: {line}"
            assert "np.load(" not in line or "allow_pickle=False" in line, f"{path}: {line}"


# ---- recipes ----

HOSTILE_YAML = [
    "!!python/object/apply:os.system ['touch pwned']",
    "model: !!python/name:os.system",
    "model: !!binary aGVsbG8=\nmethod: !!set {a, b}",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: [*c, *c]",
    "model: {" * 2000,
    "[" * 20000,
    "model: " + "9" * 6000,
    "training: {max_train_steps: " + "9" * 6000 + "}",
    "training: {max_train_steps: 1.0e+400}",
    "seed: -1",
    "model: \x00",
    "model: \ud800",
    "? [a, b]\n: c",
    "1: 2\nnull: 3\ntrue: 4",
    "",
    "- a",
    "&a [*a]",
]


@pytest.mark.parametrize("text", HOSTILE_YAML, ids=range(len(HOSTILE_YAML)))
def test_a_recipe_that_was_made_to_do_damage(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(InputError) as error:
        validate(Recipe, read_yaml(tmp_path / "recipe.yaml"), "recipe")
    assert "\n" not in str(error.value)
    assert time.perf_counter() - began < 10
    assert not (tmp_path / "pwned").exists()


keys = st.sampled_from([
    "model", "reward", "method", "training", "sampling", "evaluation", "seed", "name", "beta", "max_train_steps", "diffusers",
    "prompts", "texts", "path", "monitor", "steps", "solver", "train_timesteps", "count", "x",
])  # fmt: skip
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["adjoint-matching", "sum", "http"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


def only_our_errors(function: Callable[[], object]) -> None:
    with contextlib.suppress(TiltflowError):
        function()


yaml_text = st.text(max_size=60) | st.lists(
    st.sampled_from([
        "a", "b", ": ", "- ", "\n", "  ", "[", "]", "{", "}", ", ", "'", '"', "|", ">-", "# ", "&a ", "*a", "!!int ", "!x ",
        "? ", "\n---\n", "\n...\n", "%YAML 1.1\n", "%TAG ! x\n", "010", "1e-4", "1:30", "0x", "1_0", "~", "<<: ", "\t", "\\x",
        "\\U00110000", "\u2028", "\x85", "\ufeff", "@", "`", "=", "%", "\r", "\x00", "9" * 5000, "[" * 70,
    ])
    | st.text(max_size=2),
    max_size=25,
).map("".join)  # fmt: skip


def any_recipe(tree: dict[str, Any], text: str) -> None:
    only_our_errors(lambda: validate(Recipe, tree, "recipe"))
    only_our_errors(lambda: validate(Recipe, tree, "recipe"))
    only_our_errors(lambda: apply_overrides(tree, [text]))
    only_our_errors(lambda: apply_overrides(tree, [f"a.b={text}"]))
    only_our_errors(lambda: parse_grid([f"a={text}"]))


def any_yaml(text: str) -> None:
    try:
        tree = parse_yaml(text, "recipe")
    except InputError as error:
        assert len(str(error)) < 300  # noqa: PT017
        return
    again = parse_yaml(dump_yaml(tree), "recipe")
    assert repr(again) == repr(tree)  # NaN is NaN


@FEW
@given(tree=st.dictionaries(keys, values, max_size=6), text=yaml_text)
def test_any_recipe_is_read_or_refused(tree: dict[str, Any], text: str) -> None:
    any_recipe(tree, text)


@pytest.mark.slow
@MANY
@given(tree=st.dictionaries(keys, values, max_size=6), text=yaml_text)
def test_any_recipe_is_read_or_refused_fuzz(tree: dict[str, Any], text: str) -> None:
    any_recipe(tree, text)


@FEW
@given(text=yaml_text)
def test_any_yaml_is_read_and_written_or_refused(text: str) -> None:
    any_yaml(text)


@pytest.mark.slow
@settings(MANY, max_examples=20_000)
@given(text=yaml_text)
def test_any_yaml_is_read_and_written_or_refused_fuzz(text: str) -> None:
    any_yaml(text)


rows = st.lists(
    values | st.dictionaries(st.sampled_from(["prompt", "promt", "x"]), values | st.text(max_size=9), max_size=3), max_size=4
)
prompt_files = st.tuples(
    st.sampled_from([".txt", ".jsonl", ".json", ".csv"]),
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | rows.map(lambda rows: json.dumps(rows).encode())
    | rows.map(lambda rows: "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass"))
    | st.just(b"[" * 100_000),
)


def any_prompts(folder: Path, suffix: str, content: bytes) -> None:
    path = folder / f"prompts{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        for part in read_prompts(Prompts(path=str(path)), 0):
            assert all(prompt.text == prompt.text.strip() != "" for prompt in part)
            "\n".join(prompt.text for prompt in part).encode()


@FEW
@given(file=prompt_files)
def test_any_prompts_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes]) -> None:
    any_prompts(tmp_path_factory.getbasetemp(), *file)


@pytest.mark.slow
@MANY
@given(file=prompt_files)
def test_any_prompts_are_read_or_refused_fuzz(tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes]) -> None:
    any_prompts(tmp_path_factory.getbasetemp(), *file)


def test_a_checkpoint_is_looked_for_inside_its_run_alone(tmp_path: Path) -> None:
    recipe = validate(Recipe, read_yaml(tiny_recipe(tmp_path)), "recipe")
    run(recipe, tmp_path / "run")
    save_checkpoint(tmp_path, 99, {"loop": {}, "environment": {}})
    for wanted in ("../../step-00000099", str(tmp_path / "step-00000099"), "..", ""):
        training = recipe.training.model_copy(update={"resume_from_checkpoint": wanted})
        with pytest.raises(TiltflowError, match=r"has no checkpoint|not a complete checkpoint"):
            run(recipe.model_copy(update={"training": training}), tmp_path / "run")


# ---- code ----

EVIL = """
from pathlib import Path
Path(__file__).with_suffix(".ran").write_text("")
def f(x, *rest):
    return x.flatten(1).sum(1)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    training = {"max_train_steps": 1, "train_batch_size": 4}
    run(validate(Recipe, read_yaml(tiny_recipe(folder, training=training)), "recipe"), folder / "run")
    return folder / "run"


def plant(trained: Path, to: Path, function: str) -> Path:
    """A copy of a run whose recipe names a function that lies beside it."""
    shutil.copytree(trained, to)
    (to / "evil.py").write_text(EVIL)
    (to / "package").mkdir()
    (to / "package" / "__init__.py").write_text(EVIL)
    tree = read_yaml(to / "recipe.yaml")
    tree["reward"] = {"name": "function", "path": function}
    (to / "recipe.yaml").write_text(dump_yaml(tree))
    return to


COMMANDS = {
    "evaluate": ["evaluate", "."],
    "doctor": ["doctor", "recipe.yaml"],
    "doctor of a folder": ["doctor", "."],
    "train": ["train", "recipe.yaml", "--output", "../again"],
    "resume": ["train", ".", "--output", ".", "--resume"],
    "sample": ["sample", ".", "-n", "1", "-o", "../x.png", "--solver", "evil:f"],
    "serve-reward": ["serve-reward", "recipe.yaml", "--port", "0"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("function", ["evil:f", "package:f"])
def test_code_that_came_with_a_run_is_not_run(
    name: str, function: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = plant(trained, tmp_path / "run", function)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(run_folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, out, err = call(monkeypatch, capsys, *COMMANDS[name])
    assert code == (1 if name.startswith("doctor") else 2)
    assert f"{tmp_path}/run/{'package' if 'package' in function and name != 'sample' else 'evil.py'}" in out + err
    assert "--allow-code" in out + err
    assert str(run_folder) not in sys.path
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before  # nothing ran, nothing written


def test_wherever_it_is_found_code_of_a_run_needs_consent(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a package below the current directory, on the Python path, by a link into a run, and deep inside one."""
    planted = plant(trained, tmp_path / "run", "evil:f")
    (planted / "package" / "deep.py").write_text(EVIL)
    (tmp_path / "inward.py").symlink_to(planted / "evil.py")
    (planted / "outward.py").symlink_to(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text(EVIL)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    for path in ("run.evil:f", "run.package.deep:f", "inward:f"):
        with pytest.raises(InputError, match=r"^reward .* would run code .*/run.* if you trust it, add --allow-code"):
            import_function(path, "reward")
    for inside in (planted, planted / "package"):
        monkeypatch.setattr(sys, "path", [str(inside), *sys.path])
        for path in ("evil:f", "package:f", "deep:f", "outward:f"):
            with pytest.raises(InputError, match=r"would run|there is no module"):
                import_function(path, "reward")
    assert not list(tmp_path.rglob("*.ran"))
    assert import_function("mine:f", "reward")
    with allow_code():
        assert import_function("run.evil:f", "reward")
    assert sorted(path.name for path in tmp_path.rglob("*.ran")) == ["evil.ran", "mine.ran"]
    assert not code_allowed()


def test_with_consent_the_code_of_a_run_is_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(trained, tmp_path / "run", "consented:f")
    (tmp_path / "run" / "consented.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["tiltflow", "evaluate", ".", "--num-samples", "4", "--allow-code", "-q"])
    with pytest.raises(SystemExit) as stop:
        tiltflow.commands.terminal.app.main()
    assert not stop.value.code, capsys.readouterr().err
    assert (tmp_path / "run" / "consented.ran").exists()
    assert not code_allowed()


def test_nothing_in_the_current_directory_hides_a_package(trained: Path, tmp_path: Path) -> None:
    """`python -m` puts it first."""
    planted = plant(trained, tmp_path / "run", "evil:f")
    for name in ("torch", "typer", "rich", "pydantic", "matplotlib", "flash_attn"):
        (planted / f"{name}.py").write_text(EVIL)
    done = subprocess.run(
        [sys.executable, "-m", "tiltflow", "evaluate", "."], cwd=planted, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--allow-code" in done.stderr
    assert not list(tmp_path.rglob("*.ran"))


def test_help_says_that_a_recipe_can_run_code() -> None:
    for command in ("train", "doctor", "sweep", "evaluate"):
        said = " ".join(CliRunner().invoke(tiltflow.commands.terminal.app.app, [command, "--help"]).output.split())
        assert "A recipe can run code: the Python functions that it names" in said
        assert "--allow-code" in said


# ---- links ----

PLACES = [
    "recipe.yaml", "metrics.jsonl", "summary.json", "report.html", "before.png", "after.png", "model", "best", "base",
    "model/model.safetensors", "model/README.md", "checkpoints", "monitor.jsonl", "diagnostics", ".summary.json.tmp",
]  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_links_are_not_followed_out_of_a_run(name: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    outside, place = tmp_path / "outside", tmp_path / "run" / name
    if place.exists():
        place.rename(outside)
    elif "." in name:
        outside.write_text("mine")
    else:
        outside.mkdir()
    place.symlink_to(outside)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for use in (evaluate_run, load_text_to_image, partial(export_run, output=tmp_path / "exported"), resume):
        with pytest.raises(InputError, match=rf"/run/{re.escape(name)}: is a link, and links are not followed"):
            use(tmp_path / "run")
    place.unlink()
    place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is a link|not a run folder, it has no"):
        evaluate_run(tmp_path / "run")
    assert not (tmp_path / "exported").exists()
    place.unlink()
    before.pop(place, None)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def resume(folder: Path) -> None:
    recipe = validate(Recipe, read_yaml(folder / "recipe.yaml"), "recipe")
    training = recipe.training.model_copy(update={"resume_from_checkpoint": "latest"})
    run(recipe.model_copy(update={"training": training}), folder)


def any_links(trained: Path, folder: Path, links: list[tuple[str, str, bool]]) -> None:
    """A run some of whose files are links, by name or on the disk, is measured or refused, and nothing outside is changed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained, folder / "run")
    (folder / "outside").mkdir()
    for number, (name, to, soft) in enumerate(links):
        place, outside = folder / "run" / name, folder / "outside" / str(number)
        with contextlib.suppress(OSError):
            if place.exists():
                place.rename(outside)
            elif to == "file":
                outside.write_text("mine")
            elif to == "folder":
                outside.mkdir()
            place.symlink_to(outside) if soft else place.hardlink_to(outside)
    before = {path: path.read_bytes() for path in (folder / "outside").rglob("*") if path.is_file()}
    only_our_errors(lambda: evaluate_run(folder / "run", num_samples=2))
    assert {path: path.read_bytes() for path in (folder / "outside").rglob("*") if path.is_file()} == before


links = st.lists(
    st.tuples(st.sampled_from(PLACES), st.sampled_from(["file", "folder", "nothing"]), st.booleans()), min_size=1, max_size=4
)


@settings(FEW, max_examples=8)
@given(links=links)
def test_any_links_leave_what_is_outside_alone(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, links: list[tuple[str, str, bool]]
) -> None:
    any_links(trained, tmp_path_factory.getbasetemp() / "links", links)


@pytest.mark.slow
@settings(MANY, max_examples=500)
@given(links=links)
def test_any_links_leave_what_is_outside_alone_fuzz(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, links: list[tuple[str, str, bool]]
) -> None:
    any_links(trained, tmp_path_factory.getbasetemp() / "links", links)


def test_a_file_that_has_another_name_outside_is_not_written_through(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    names = ("before.png", "after.png", "summary.json", "report.html")
    for name in names:
        (tmp_path / name).hardlink_to(tmp_path / "run" / name)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    evaluate_run(tmp_path / "run", num_samples=4)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert all((tmp_path / "run" / name).read_bytes() != before[name] for name in ("after.png", "summary.json"))


def test_a_run_that_is_reached_by_a_link_is_one(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "wandb").mkdir()
    (tmp_path / "run" / "wandb" / "latest-run").symlink_to(tmp_path)  # as its tracker makes them
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert evaluate_run(tmp_path / "link", num_samples=4)["num_samples"] == 4


# ---- files ----


def damaged(content: bytes, cut: int, flips: list[tuple[int, int]]) -> bytes:
    changed = bytearray(content[: len(content) - cut])
    for at, value in flips:
        if changed:
            changed[at % len(changed)] ^= value
    return bytes(changed)


harm = {"cut": st.integers(0, 200), "flips": st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small file of each kind that tiltflow reads."""
    folder = tmp_path_factory.mktemp("originals")
    tiny_flow(folder / "flow")
    saved = save_checkpoint(folder, 1, {"loop": {"w": torch.ones(3)}, "environment": {}})
    np.savez_compressed(folder / "data.npz", x_train=np.zeros((4, 8, 8), np.uint8), y_train=np.zeros(4))
    torch.save({"a": torch.ones(2)}, folder / "weights.pt")
    (folder / "prompts.jsonl").write_text('{"prompt": "a red cat", "x": 1}\n' * 3)
    paths = {
        "config.json": folder / "flow" / "config.json",
        "model.safetensors": folder / "flow" / "model.safetensors",
        "data.npz": folder / "data.npz",
        "weights.pt": folder / "weights.pt",
        "prompts.jsonl": folder / "prompts.jsonl",
        **{name: saved / name for name in (MANIFEST, NUMBERS, TENSORS)},
    }
    return {name: path.read_bytes() for name, path in paths.items()}


READ: dict[str, Callable[[Path], object]] = {
    "config.json": lambda path: load(path.parent),
    "model.safetensors": lambda path: load(path.parent),
    "data.npz": load_images,
    "weights.pt": lambda path: read_tensors(path, "weights"),
    "prompts.jsonl": lambda path: read_prompts(Prompts(path=str(path)), 0),
    MANIFEST: lambda path: load_checkpoint(path.parent),
    NUMBERS: lambda path: load_checkpoint(path.parent),
    TENSORS: lambda path: load_checkpoint(path.parent),
}


def read_damaged(name: str, originals: dict[str, bytes], folder: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    for other, content in originals.items():
        (folder / other).write_bytes(content if other != name else damaged(content, cut, flips))
    only_our_errors(lambda: READ[name](folder / name))


@pytest.mark.parametrize("name", READ)
def test_any_damage_to_a_file_is_found_or_harmless(
    name: str, originals: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")

    @FEW
    @given(**harm)
    def check(cut: int, flips: list[tuple[int, int]]) -> None:
        read_damaged(name, originals, folder, cut, flips)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_any_damage_to_a_file_is_found_or_harmless_fuzz(
    name: str, originals: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, tried = tmp_path_factory.mktemp("damaged"), []

    @settings(MANY, max_examples=1000)
    @given(**harm)
    def check(cut: int, flips: list[tuple[int, int]]) -> None:
        tried.append(cut)
        read_damaged(name, originals, folder, cut, flips)

    check()
    print(f"{name}: {len(tried)} damaged files")


@FEW
@given(
    changes=st.dictionaries(
        st.sampled_from(["channels", "blocks", "embedding", "name", "kind", "event_shape", "zz"]), values, max_size=3
    )
)
def test_any_config_builds_a_network_or_is_refused(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("config")
    tiny_flow(folder)
    tree = json.loads((folder / "config.json").read_text())
    network = tree["network"] | {
        key: value for key, value in changes.items() if key in ("channels", "blocks", "embedding", "name", "zz")
    }
    rest = {key: value for key, value in changes.items() if key in ("kind", "event_shape")}
    (folder / "config.json").write_text(json.dumps(tree | {"network": network} | rest))
    only_our_errors(lambda: load(folder))


def test_a_config_that_asks_for_all_the_memory(tmp_path: Path) -> None:
    folder = tiny_flow(tmp_path / "flow")
    tree = json.loads((folder / "config.json").read_text())
    tree["network"]["channels"] = [2**40, 2**40]
    (folder / "config.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="its network cannot be built"):
        load(folder)
    assert UNET.channels == (8, 8)


def test_an_archive_that_says_it_is_endless(tmp_path: Path) -> None:
    """A .npy header that promises a petabyte, and a path that leads out of the archive."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**15, 8, 8)})
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x_train.npy", header.getvalue() + b"0")
        archive.writestr("../outside.npy", b"x")
    with pytest.raises(InputError, match=r"not a readable .npz file"):
        load_images(tmp_path / "data.npz")
    assert not (tmp_path.parent / "outside.npy").exists()


def test_a_picture_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("L", (400, 400)).save(tmp_path / "pictures" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb.png: not a readable image"):
        load_images(tmp_path / "pictures")


def test_a_forged_checkpoint_is_an_error_and_not_a_traceback(tmp_path: Path) -> None:
    """One whose manifest verifies, and whose content is nonsense."""
    recipe = validate(Recipe, read_yaml(tiny_recipe(tmp_path)), "recipe")
    run(recipe, tmp_path / "run")
    again = recipe.model_copy(update={"training": recipe.training.model_copy(update={"resume_from_checkpoint": "latest"})})
    root = tmp_path / "run" / FOLDER
    good = load_checkpoint(next(iter(root.iterdir())))
    forged: list[Any] = [
        {"a": 1},
        {"loop": 3, "environment": {}},
        {"loop": {}, "environment": {}},
        {"loop": good["loop"] | {"step": "many"}, "environment": {}},
        {"loop": good["loop"] | {"optimizer": {"state": 1, "param_groups": []}}, "environment": {}},
        {"loop": good["loop"] | {"average": {"values": [], "updates": 0}}, "environment": {}},
    ]
    for i, state in enumerate(forged):
        save_checkpoint(root, 1000 + i, state)
        with pytest.raises((CheckpointError, InputError)) as error:
            run(again, tmp_path / "run")
        assert "\n" not in str(error.value)


# ---- folders of diffusers pipelines ----

ODD = st.sampled_from([
    None, True, -1, 0, 1, 3, 10**5, 10**9, -(10**9), 10**30, 1e308, float("nan"), 0.5, "x", "", [], {}, [1e9], ["x"], [[]],
    {"a": 1}, "../../etc/passwd", "torch.nn.Linear", "epsilon", "trailing",
])  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion on disk."""
    pytest.importorskip("diffusers")
    from tiny_pipelines import tiny_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("stable-diffusion", folder / "parts").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def drawn_from(folder: Path) -> Tensor:
    """A small picture, from what a folder holds."""
    from tiltflow.models.from_diffusers import from_diffusers

    model = from_diffusers(folder, height=16, width=16)
    return model.sample(["a"], sampling=Sampling(solver="euler", num_inference_steps=2))


def any_pipeline(original: Path, folder: Path, draw: st.DataObject) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    file = draw.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    tree = json.loads(file.read_bytes()) if file.suffix == ".json" else None
    match draw.draw(st.sampled_from(["number", "number", "number", "missing key", "damaged", "gone"])):
        case "number" if tree:
            file.write_text(json.dumps(tree | {draw.draw(st.sampled_from(sorted(tree))): draw.draw(ODD)}))
        case "missing key" if tree:
            del tree[draw.draw(st.sampled_from(sorted(tree)))]
            file.write_text(json.dumps(tree))
        case "gone":
            file.unlink()
        case _:
            file.write_bytes(damaged(file.read_bytes(), **draw.draw(st.fixed_dictionaries(harm))))
    began = time.monotonic()
    try:
        assert drawn_from(folder).shape == (1, 3, 16, 16)
    except TiltflowError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert time.monotonic() - began < 20


@settings(FEW, max_examples=12)
@given(draw=st.data())
def test_any_pipeline_is_loaded_or_refused(
    pipeline: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    any_pipeline(pipeline, tmp_path_factory.getbasetemp() / "any", draw)


@pytest.mark.slow
@settings(MANY, max_examples=1000)
@given(draw=st.data())
def test_any_pipeline_is_loaded_or_refused_fuzz(
    pipeline: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    any_pipeline(pipeline, tmp_path_factory.getbasetemp() / "any", draw)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000, and no model has more than 1000"),
        ("unet/config.json", {"sample_size": 10**9}, "sample_size is 1000000000, and no model has more than 4096"),
        ("vae/config.json", {"block_out_channels": [10**9, 8]}, "block_out_channels is 1000000000, and no model has more"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000, and no model"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, r"cannot be loaded \(TypeError: "),
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 10**9},
            "model_max_length is 1000000000, and no model has more",
        ),
        ("tokenizer/tokenizer_config.json", {"model_max_length": {}}, "the pipeline's text encoder raised TypeError"),
        ("vae/config.json", {"scaling_factor": ["x"]}, "the pipeline's decoder raised TypeError"),
        ("vae/config.json", {"up_block_types": []}, r"decoder returns samples of shape \[3, 8, 8\], not \["),
        (
            "text_encoder/config.json",
            {"num_hidden_layers": 4},
            r"text_encoder: its weights have \d+ numbers, its config.json needs",
        ),
        ("text_encoder/config.json", None, "text_encoder: has weights, but no config.json"),
        ("unet/config.json", None, "unet: has weights, but no config.json"),
        ("model_index.json", {"unet": ["unet", "Evil"]}, "cannot be loaded"),
        ("model_index.json", {"unet": ["os", "system"]}, "cannot be loaded"),
        ("model_index.json", {"_class_name": "Evil"}, "pipeline Evil is not known"),
    ],
)
def test_a_pipeline_that_is_none(
    pipeline: Path, tmp_path: Path, file: str, change: dict[str, Any] | None, message: str
) -> None:
    """Among them: weights that would be filled in at random without a word."""
    shutil.copytree(pipeline, tmp_path / "pipeline")
    path = tmp_path / "pipeline" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TiltflowError, match=message) as error:
        drawn_from(tmp_path / "pipeline")
    assert "\n" not in str(error.value)


def test_code_in_a_pipeline_is_not_run(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pipeline, tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"unet": ["evil", "UNet2DConditionModel"], "_class_name": ["evil", "E"]})
    )
    for place in ("evil.py", "pipeline.py", "unet/evil.py", "unet/unet.py"):
        (tmp_path / "pipeline" / place).write_text(EVIL)
    monkeypatch.chdir(tmp_path / "pipeline")
    with pytest.raises(InputError):
        drawn_from(tmp_path / "pipeline")
    assert not list(tmp_path.rglob("*.ran"))


# ---- reward servers ----

words = st.sampled_from([
    b"HTTP/1.1 ", b"200", b" OK", b"\r\n", b"\r\n\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked", b"4", b"-1",
    b"\xc2\xb2", b"0\r\n", b"429", b"500 ", b"302 Found", b"Retry-After: ", b"Location: http://127.0.0.1:1/", b"HTTP/9.9 ",
    b"Content-Encoding: gzip", b'{"rewards": [', b"1, ", b"2]}", b"NaN", b"null", b'{"error": "\x1b[2J"}', b"[" * 3000,
])  # fmt: skip
answers = (
    st.lists(words | st.binary(max_size=6), max_size=12).map(b"".join)
    | st.binary(max_size=60)
    | (st.binary(max_size=60) | values.map(lambda v: json.dumps({"rewards": v}).encode())).map(
        b"HTTP/1.1 200 OK\r\n\r\n".__add__
    )
)


@pytest.fixture(scope="module")
def says() -> Iterator[tuple[str, list[bytes]]]:
    """The address of a server that answers with the first of these bytes."""
    answer = [b""]
    with raw_answers(lambda handler: handler.wfile.write(answer[0])) as url:
        yield url, answer


def any_answer(says: tuple[str, list[bytes]], answer: bytes) -> None:
    url, says[1][0] = says[0], answer
    try:
        found = told(Http(url=url, timeout=5, retries=0).build(), ["a", "b"])(torch.zeros(2, 3, 4, 4))
    except InputError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert found.shape == (2,)


@FEW
@given(answer=answers)
def test_any_answer_is_numbers_or_refused(says: tuple[str, list[bytes]], answer: bytes) -> None:
    any_answer(says, answer)


@pytest.mark.slow
@MANY
@given(answer=answers)
def test_any_answer_is_numbers_or_refused_fuzz(says: tuple[str, list[bytes]], answer: bytes) -> None:
    any_answer(says, answer)


def flood(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(5000):
        handler.wfile.write(b"x" * (1 << 16))


def test_an_answer_without_end() -> None:
    with raw_answers(flood) as url:
        reward = told(Http(url=url, retries=0).build(), ["a"])
        began = time.monotonic()
        with pytest.raises(InputError, match="is longer than 1048576 bytes"):
            reward(torch.zeros(1, 3, 8, 8))
        assert time.monotonic() - began < 5


# ---- requests of a reward ----

arrays = st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 5), st.integers(0, 5)).map(
    lambda shape: npy(np.zeros(shape, np.float32))
)
headers = st.builds(
    lambda descr, order, shape, more: npy_header(f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}{more}}}"),
    st.sampled_from(["<f4", ">f4", "|O", "<f8", "|V0", "x", ["a"], ("<f4", (2,)), "<U999999999"]),
    st.sampled_from([True, False, 1, "x"]),
    st.lists(st.integers(-2, 10**12), max_size=4).map(tuple) | st.just("x"),
    st.sampled_from(["", ", 'x': 1", "}", ", **{}"]),
)
pictures_sent = st.lists(st.just(png()) | arrays | headers | st.text(max_size=20) | values, min_size=1, max_size=3)
requests = (
    st.binary(max_size=80)
    | values.map(lambda v: json.dumps(v).encode())
    | st.fixed_dictionaries(
        {"images": pictures_sent},
        optional={"prompts": st.lists(st.text(max_size=5), max_size=3) | values, "metadata": st.lists(values) | values},
    ).map(lambda tree: json.dumps(tree).encode())
)


def any_request(body: bytes) -> None:
    try:
        images, prompts, metadata = read_request(body)
    except BadRequestError:
        return
    assert images.ndim == 4
    assert len(prompts) == len(metadata)
    assert len(prompts) in (0, len(images))


@FEW
@given(body=requests)
def test_any_request_is_pictures_or_refused(body: bytes) -> None:
    any_request(body)


@pytest.mark.slow
@MANY
@given(body=requests)
def test_any_request_is_pictures_or_refused_fuzz(body: bytes) -> None:
    any_request(body)


@pytest.mark.slow
@settings(MANY, max_examples=3000)
@given(**harm)
def test_any_damage_to_a_picture_sent_is_found_or_harmless_fuzz(cut: int, flips: list[tuple[int, int]]) -> None:
    for file in (png(), npy(np.ones((3, 4, 4), np.float32))):
        sent = base64.b64encode(damaged(base64.b64decode(file), cut, flips)).decode()
        any_request(json.dumps({"images": [sent]}).encode())
