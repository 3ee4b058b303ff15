"""Input that was made to do damage: refused in one line, nothing run, nothing written elsewhere, nothing without end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_http_reward import serving
from tiny import UNET, tiny_flow, tiny_recipe
from torch import Tensor

from tiltflow.checkpoint import FOLDER, MANIFEST, NUMBERS, TENSORS, load_checkpoint, save_checkpoint
from tiltflow.data import load_captioned, load_images
from tiltflow.errors import CheckpointError, InputError, TiltflowError
from tiltflow.model import load, read_tensors
from tiltflow.prompts import Prompts, read_prompts
from tiltflow.reward import given as told
from tiltflow.rewards.http import Http, rewards_in
from tiltflow.run import Recipe, run
from tiltflow.run_text_to_image import TextToImageRecipe
from tiltflow.settings import apply_overrides, parse_yaml, read_yaml, validate

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


def any_recipe(tree: dict[str, Any], text: str) -> None:
    only_our_errors(lambda: validate(Recipe, tree, "recipe"))
    only_our_errors(lambda: validate(TextToImageRecipe, tree, "recipe"))
    only_our_errors(lambda: parse_yaml(text, "recipe"))
    only_our_errors(lambda: apply_overrides(tree, [text]))


@FEW
@given(tree=st.dictionaries(keys, values, max_size=6), text=st.text(max_size=60))
def test_any_recipe_is_read_or_refused(tree: dict[str, Any], text: str) -> None:
    any_recipe(tree, text)


@pytest.mark.slow
@MANY
@given(tree=st.dictionaries(keys, values, max_size=6), text=st.text(max_size=60))
def test_any_recipe_is_read_or_refused_fuzz(tree: dict[str, Any], text: str) -> None:
    any_recipe(tree, text)


def test_a_checkpoint_is_looked_for_inside_its_run_alone(tmp_path: Path) -> None:
    recipe = validate(Recipe, read_yaml(tiny_recipe(tmp_path)), "recipe")
    run(recipe, tmp_path / "run")
    save_checkpoint(tmp_path, 99, {"loop": {}, "environment": {}})
    for wanted in ("../../step-00000099", str(tmp_path / "step-00000099"), "..", ""):
        training = recipe.training.model_copy(update={"resume_from_checkpoint": wanted})
        with pytest.raises(TiltflowError, match=r"has no checkpoint|no checkpoint, or not a whole one"):
            run(recipe.model_copy(update={"training": training}), tmp_path / "run")


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


# ---- reward servers ----


class Server(BaseHTTPRequestHandler):
    """Says what the test wants."""

    say: Callable[[Any], None]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            type(self).say(self)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def saying(say: Callable[[Any], None]) -> Iterator[str]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), type("Says", (Server,), {"say": say}))) as url:
        yield url


def drip(server: Any) -> None:
    """A byte now and then, within the socket's timeout each time."""
    server.send_response(200)
    server.end_headers()
    for _ in range(200):
        server.wfile.write(b" ")
        server.wfile.flush()
        time.sleep(0.05)


def flood(server: Any) -> None:
    server.send_response(200)
    server.end_headers()
    for _ in range(5000):
        server.wfile.write(b"x" * (1 << 16))


@pytest.mark.parametrize(("say", "message"), [(drip, "has not ended after 0.5 s"), (flood, "is longer than")])
def test_an_answer_without_end(say: Callable[[Any], None], message: str) -> None:
    with saying(say) as url:
        reward = told(Http(url=url, timeout=0.5, retries=0).build(), ["a"])
        began = time.monotonic()
        with pytest.raises(InputError, match=message):
            reward(torch.zeros(1, 3, 8, 8))
        assert time.monotonic() - began < 5


@FEW
@given(answer=st.binary(max_size=80) | values.map(lambda v: json.dumps({"rewards": v}).encode()))
def test_any_answer_is_numbers_or_refused(answer: bytes) -> None:
    try:
        found = rewards_in(answer, 2, "url")
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert bool(Tensor.isfinite(torch.tensor(found, dtype=torch.float64)).all())


@pytest.mark.parametrize(
    "answer", [b"[" * 100_000, b'{"rewards": [1' + b"0" * 400 + b", 1]}", b'{"rewards": [NaN, 1]}', b'{"rewards": [true, 1]}']
)
def test_answers_that_break_parsers(answer: bytes) -> None:
    with pytest.raises(InputError):
        rewards_in(answer, 2, "url")
