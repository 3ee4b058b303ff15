"""Every reward against an independent computation, its gradient against finite differences, and its errors."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_scorers import tiny_aesthetic_head, tiny_clip, tiny_image_reward
from torch import Tensor

from tiltflow.data import to_pixels
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.models.model_folder import ClassifierConfig, load_classifier, save_model
from tiltflow.networks.residual_classifier import ResidualClassifier
from tiltflow.plugins import find, names
from tiltflow.rewards import LearnedReward, RewardSettings, select
from tiltflow.rewards import class_log_odds as class_log_odds_module
from tiltflow.rewards.class_log_odds import ClassLogOdds, bounded, class_log_odds
from tiltflow.rewards.function import Function
from tiltflow.rewards.functions.checked import evaluate, value_and_gradient
from tiltflow.rewards.functions.prompted import given
from tiltflow.rewards.ink import Ink
from tiltflow.rewards.jpeg_size import JpegSize
from tiltflow.rewards.named_colour import NamedColour
from tiltflow.rewards.png_size import PngSize
from tiltflow.rewards.stroke_thickness import StrokeThickness, thickness
from tiltflow.rewards.sum import Sum
from tiltflow.settings import Settings, validate
from tiltflow.streams import stream

CLASSES = 4
ANGLES = range(0, 180, 15)
OFFSETS = (0.0, 0.25, 0.5)


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    """The folder of a small random classifier of grey images."""
    settings = ResidualClassifier(classes=CLASSES, channels=(8,))
    network, generator = settings.build(), stream(0, "classifier")
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    folder = tmp_path / "classifier"
    save_model(folder, ClassifierConfig(network=settings, class_names=tuple("abcd")), network, "random")
    return str(folder)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module into the current directory and get its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(code: str) -> str:
        (tmp_path / "rewards_of_mine.py").write_text(code, encoding="utf-8")
        return "rewards_of_mine"

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=stream(seed, "images"), dtype=torch.float64) * 2 - 1


OF_MOLECULES = ("xtb-energy", "dipole", "mmff-energy", "qed", "logp", "sa-score", "validity")
ELSEWHERE = ("http", "image-similarity", "norm", "ocr", "preference", "profile", "q-function", *OF_MOLECULES)
"""Rewards that have tests of their own: they need more than a picture, or are of points."""
LOCAL = [name for name in names("rewards") if name not in ELSEWHERE]
PROMPTS = ["red", "a green cat", "blue", "white on black", "black"]


def channels(settings: Any) -> int:
    """Of the pictures that a reward is of."""
    return 3 if settings.name in OF_PICTURES else 1


OF_PICTURES = {"named-colour", "clip-score", "pick-score", "hps", "image-reward", "aesthetic"}


def scorers(folder: Path) -> dict[str, dict[str, Any]]:
    """What the rewards by published models need: small ones."""
    clip, (image_reward, tokenizer) = str(tiny_clip(folder)), tiny_image_reward(folder)
    return {
        "clip-score": {"model": clip},
        "pick-score": {"model": clip, "tokenizer": None},
        "hps": {"model": clip, "tokenizer": None},
        "aesthetic": {"model": clip, "head": str(tiny_aesthetic_head(folder))},
        "image-reward": {"model": str(image_reward), "tokenizer": str(tokenizer)},
    }


def every_reward(classifier: str) -> dict[str, Settings]:
    """One instance of each reward, with what it needs."""
    terms = [{"reward": "ink", "weight": 2}, {"reward": "stroke-thickness", "weight": -0.5}]
    data = Path(classifier).with_name("data.npz")
    np.savez(data, x_train=np.zeros((2, 8, 8), dtype=np.uint8))
    needs: dict[str, dict[str, Any]] = {
        **scorers(Path(classifier).parent),
        "energy": {"data": str(data)},
        "class-log-odds": {"classifier": classifier, "classes": [0, 2]},
        "class-probability": {"classifier": classifier, "classes": [0, 2]},
        "function": {"path": "tiltflow.rewards.stroke_thickness:thickness"},
        "sum": {"rewards": terms},
    }
    return {name: find("rewards", name).model_validate(needs.get(name, {})) for name in LOCAL}


def problem(name: str, **tree: Any) -> str:
    with pytest.raises(InputError) as caught:
        validate(find("rewards", name), tree, "reward")
    return str(caught.value)


# ---- what all rewards have in common


def test_of_a_video_a_reward_of_pictures_is_the_mean_over_its_frames(classifier: str) -> None:
    """Each frame with the prompt of its video, and with its share of the gradient."""
    prompts = ("a red cat", "a blue dog")
    for name, settings in every_reward(classifier).items():
        if name in ("energy", "function"):  # it learns, and is refused for what is decoded; it sees whole videos
            continue
        reward: Any = settings.build()  # type: ignore[attr-defined]
        videos = torch.rand(2, 3, channels(settings), 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        videos[0, 0] = 0.3  # a small file
        videos.requires_grad_(settings.differentiable)  # type: ignore[attr-defined]
        alone = [given(reward, prompts)(videos[:, i]) for i in range(videos.shape[1])]
        expected = torch.stack(alone).mean(0)
        found = given(reward, prompts)(videos)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6), name
        assert not torch.allclose(found, given(reward, prompts)(videos.flip(0)))
        if settings.differentiable:  # type: ignore[attr-defined]
            theirs, ours = (torch.autograd.grad(value.sum(), videos)[0] for value in (expected, found))
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("name", LOCAL)
def test_conventions(name: str, classifier: str) -> None:
    settings: Any = every_reward(classifier)[name]
    assert isinstance(settings, RewardSettings)
    assert settings.learned == isinstance(settings.build(), LearnedReward)
    assert settings.name == name
    assert type(settings).__doc__
    assert isinstance(settings.differentiable, bool)
    for text in (settings.unit, settings.description):
        assert text
        assert "\n" not in text
        assert not text.endswith(".")
    assert type(settings).model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("name", LOCAL)
def test_value_shape_and_gradient(name: str, classifier: str) -> None:
    settings: Any = every_reward(classifier)[name]
    reward, x = given(settings.build(), PROMPTS[:3]), images(3, channels(settings), 12, 10).float()
    before = x.clone()
    assert evaluate(reward, x).shape == (3,)
    assert torch.equal(x, before)
    if settings.differentiable:
        _, gradient = value_and_gradient(reward, x)
        assert (gradient.flatten(1).norm(dim=1) > 0).all()
    else:
        assert not reward(x.requires_grad_()).requires_grad
        with pytest.raises(InputError, match="no gradient"):
            value_and_gradient(reward, x)


@pytest.mark.parametrize("name", LOCAL)
def test_no_sample_looks_at_its_neighbours(name: str, classifier: str) -> None:
    settings: Any = every_reward(classifier)[name]
    reward = given(settings.build(), PROMPTS)
    x, order = images(5, channels(settings), 8, 8).float(), torch.tensor([3, 0, 4, 1, 2])
    x[0] = 0.5  # noise of one size can have PNG files of one size
    value = reward(x)
    torch.testing.assert_close(torch.cat([select(reward, slice(i, i + 1))(x[i : i + 1]) for i in range(5)]), value)
    torch.testing.assert_close(select(reward, order)(x[order]), value[order])
    assert len(value.unique()) > 1


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (Ink(sign="more"), Ink(sign="less")),
        (StrokeThickness(sign="thicker"), StrokeThickness(sign="thinner")),
        (PngSize(sign="larger"), PngSize(sign="smaller")),
        (JpegSize(sign="larger"), JpegSize(sign="smaller")),
    ],
    ids=lambda settings: settings.name,
)
def test_sign(up: Any, down: Any) -> None:
    x = images(4, 1, 16, 16)
    value = up.build()(x)
    assert (value > 0).all()
    assert torch.equal(down.build()(x), -value)
    assert down.description.startswith("minus the ")
    assert not up.description.startswith("minus")


def test_an_unknown_reward_gets_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"^there is no reward 'class-logodds', did you mean 'class-log-odds'\?$"):
        find("rewards", "class-logodds")


# ---- reward.evaluate


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3.0, "must return a tensor, got float"),
        (torch.zeros(2, 1), r"one number per sample, shape \[2\], got \[2, 1\]"),
        (torch.tensor(0.0), r"shape \[2\], got \[\]"),
        (torch.zeros(2, dtype=torch.int64), "must return floats, got int64"),
    ],
)
def test_evaluate_refuses(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(lambda x: value, torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_evaluate_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="not finite for 1 of 2 samples"):
        evaluate(lambda x: torch.tensor([0.0, bad]), torch.zeros(2, 1, 4, 4))


# ---- class-log-odds


def test_log_odds_are_those_of_the_probabilities() -> None:
    logits = images(6, 5) * 3
    p = logits.exp()[:, [1, 4]].sum(1) / logits.exp().sum(1)
    expected = (p / (1 - p)).log()
    torch.testing.assert_close(class_log_odds(logits, torch.tensor([1, 4]), torch.tensor([0, 2, 3])), expected)


def test_class_log_odds_of_a_classifier(classifier: str) -> None:
    x = images(6, 1, 8, 8).float()
    network, _ = load_classifier(classifier)
    p = network(x).softmax(1).double()
    expected = ((p[:, 1] + p[:, 3]) / (p[:, 0] + p[:, 2])).log()
    free = ClassLogOdds(classifier=classifier, classes=(3, 1), bound=None).build()
    torch.testing.assert_close(free(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ClassLogOdds(classifier=classifier, classes=(0, 2), bound=None).build()(x), -free(x))
    tight = ClassLogOdds(classifier=classifier, classes=(1, 3), bound=0.5).build()(x)
    torch.testing.assert_close(tight.double(), expected / (1 + 4 * expected**2).sqrt(), rtol=1e-4, atol=1e-4)
    assert torch.equal(free(x.double()), free(x))


def test_class_probability_of_a_classifier(classifier: str) -> None:
    x = images(6, 1, 8, 8)
    network, _ = load_classifier(classifier)
    expected = network(x.float()).softmax(1)[:, [0, 2]].sum(1)
    reward = find("rewards", "class-probability")(classifier=classifier, classes=(0, 2)).build()  # type: ignore[attr-defined]
    torch.testing.assert_close(reward(x), expected)


@pytest.mark.parametrize("bound", [None, 0.5, 10.0])
def test_gradient_of_class_log_odds(classifier: str, bound: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_double(*arguments: Any) -> Any:
        network, config = load_classifier(*arguments)
        return network.double(), config

    monkeypatch.setattr(class_log_odds_module, "load_classifier", in_double)
    reward = ClassLogOdds(classifier=classifier, classes=(2,), bound=bound).build()
    assert torch.autograd.gradcheck(reward, images(2, 1, 6, 6).requires_grad_())


@pytest.mark.parametrize("bound", [0.5, 10.0])
def test_the_bound(bound: float) -> None:
    value = torch.linspace(-200, 200, 4001, dtype=torch.float64)
    result = bounded(value, bound)
    assert (result.abs() < bound).all()
    assert (result.diff() > 0).all()
    torch.testing.assert_close(result, -result.flip(0))
    inside = value[value.abs() <= bound / 4]
    assert ((bounded(inside, bound) - inside).abs() <= 0.03 * inside.abs()).all()


@pytest.mark.parametrize("bound", [None, 1.0, 10.0])
@pytest.mark.parametrize("extreme", [-30.0, 30.0])
def test_the_gradient_vanishes_nowhere(bound: float | None, extreme: float) -> None:
    logits = torch.full((1, CLASSES), -extreme)
    logits[0, 1] = extreme
    logits.requires_grad_()
    value = bounded(class_log_odds(logits, torch.tensor([1]), torch.tensor([0, 2, 3])), bound)
    assert value.item() * extreme > 0
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient[0, 1] > 1e-6
    assert gradient[0, 1] == pytest.approx(-gradient[0, [0, 2, 3]].sum().item())


def test_description_of_class_log_odds() -> None:
    even = ClassLogOdds(classes=(0, 2, 4, 6, 8))
    assert even.description == "log-odds that the class is 0, 2, 4, 6 or 8; above 0 the classifier says yes, bounded to ±10"
    seven = ClassLogOdds(classes=(7,), bound=None)
    assert seven.description == "log-odds that the class is 7; above 0 the classifier says yes, unbounded"


def test_wrong_classes(classifier: str) -> None:
    assert problem("class-log-odds") == "reward: classes is missing"
    assert problem("class-log-odds", classes=[]) == "reward: classes: needs at least one class, for example [0, 2, 4]"
    assert problem("class-log-odds", classes=[1, 2, 1]) == "reward: classes: 1 is given twice"
    assert "greater than or equal to 0 (got -1)" in problem("class-log-odds", classes=[-1])
    assert "bound must be greater than 0 (got 0)" in problem("class-log-odds", classes=[1], bound=0)
    with pytest.raises(InputError, match=r"no class 4; the classes of .* are 0 to 3"):
        ClassLogOdds(classifier=classifier, classes=(1, 4)).build()
    with pytest.raises(InputError, match=r"all 4 classes of .*; leave out at least one"):
        ClassLogOdds(classifier=classifier, classes=(0, 1, 2, 3)).build()
    with pytest.raises(InputError, match="there is no model 'digit-classifier'"):
        ClassLogOdds(classifier="digit-classifier", classes=(0,)).build()


# ---- ink


@pytest.mark.parametrize("channels", [1, 3])
def test_ink(channels: int) -> None:
    x = torch.full((3, channels, 4, 5), -1.0)
    x[1] = 1
    x[2, :, 0, :] = 1
    torch.testing.assert_close(Ink().build()(x), torch.tensor([0, 1, 0.25]))
    y = images(2, channels, 4, 5)
    torch.testing.assert_close(Ink().build()(y), ((y + 1) / 2).mean((1, 2, 3)))
    _, gradient = value_and_gradient(Ink(sign="less").build(), y * 3)
    torch.testing.assert_close(gradient, torch.full_like(y, -1 / (2 * channels * 20)))


def test_named_colour_is_a_bell_around_the_colour_of_the_prompt() -> None:
    """exp(-|rgb - colour|^2 / 2 width^2) of each pixel, rgb in [0, 1]: 1 at the colour, by hand elsewhere."""
    reward = NamedColour(width=0.2).build()
    picture = torch.tensor([[0.3, -0.1], [1.0, -1.0], [-1.0, -1.0]])[None, :, :, None]  # two pixels, one above the other
    squares = (0.65 - 1) ** 2 + 1, (0.45 - 1) ** 2
    expected = sum(math.exp(-square / (2 * 0.2**2)) for square in squares) / 2
    assert given(reward, ["a red, blue hat"])(picture).tolist() == pytest.approx([expected])
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert given(reward, ["a hat that is red"])(red).tolist() == [1]


def test_wrong_sign() -> None:
    assert problem("ink", sign="mroe") == "reward: sign must be 'more' or 'less', did you mean 'more'? (got 'mroe')"


# ---- stroke-thickness


def stroke(width: float, angle: float, length: float = 20, size: int = 28, offset: float = 0.0) -> Tensor:
    """A bright rectangle [1, 1, size, size], drawn 8 times too large and averaged down."""
    fine, centre = 8, size / 2
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = [(-length / 2, -width / 2), (length / 2, -width / 2), (length / 2, width / 2), (-length / 2, width / 2)]
    image = Image.new("L", (size * fine, size * fine))
    ImageDraw.Draw(image).polygon(
        [((centre + offset + a * cos - b * sin) * fine - 0.5, (centre + a * sin + b * cos) * fine - 0.5) for a, b in corners],
        fill=255,
    )
    small = np.asarray(image.resize((size, size), Image.Resampling.BOX))
    return torch.from_numpy(small / 127.5 - 1)[None, None]


def readings(width: float, **options: Any) -> Tensor:
    """[angles, offsets]"""
    return torch.stack([torch.cat([thickness(stroke(width, a, offset=o, **options)) for o in OFFSETS]) for a in ANGLES])


@pytest.mark.parametrize(("length", "size", "tolerance"), [(20, 28, 0.15), (50, 64, 0.1)])
def test_thickness_is_the_width_at_any_angle(length: float, size: int, tolerance: float) -> None:
    read = torch.stack([readings(width, length=length, size=size) for width in (2, 3, 4)])
    width = torch.tensor([2, 3, 4])[:, None, None]
    assert ((read - width).abs() < tolerance * width).all()
    assert (read.diff(dim=0) > 0.6).all()
    assert read[1].max() / read[1].min() < 1.07  # how far apart the angles are


def test_thickness_is_area_over_half_the_perimeter() -> None:
    # on whole pixels, all is exact but the smoothing and the four corners: the stencil cuts 1/2 off each end of a side
    for width, length in ((4, 12), (6, 10)):
        x = torch.full((1, 1, 20, 20), -1.0, dtype=torch.float64)
        x[..., 3 : 3 + width, 2 : 2 + length] = 1
        perimeter = 2 * (width - 1) + 2 * (length - 1) + 4 * math.sqrt(1 / 2)
        expected = 2 * width * length / (perimeter + 1)
        assert thickness(x).item() == pytest.approx(expected, rel=0.011)


@pytest.mark.parametrize("channels", [1, 3])
def test_thickness_follows_its_definition(channels: int) -> None:
    """Pixel by pixel, on noise."""
    x = images(1, channels, 5, 6)
    ink = np.zeros((7, 8))
    ink[1:-1, 1:-1] = (x[0].mean(0).numpy() + 1) / 2
    length = 0.0
    for i in range(6):
        for j in range(7):
            a, b, c, d = ink[i, j], ink[i, j + 1], ink[i + 1, j], ink[i + 1, j + 1]
            along, down = (b + d - a - c) / 2, (c + d - a - b) / 2  # the gradient at the centre of the cell
            length += math.hypot(along, down, 0.01) - 0.01
    assert thickness(x).item() == pytest.approx(ink.sum() / ((length + 1) / 2))


def test_thickness_of_blank_faint_and_full_images() -> None:
    blank, full = torch.full((1, 1, 28, 28), -1.0), torch.full((1, 1, 28, 28), 1.0)
    value, gradient = value_and_gradient(StrokeThickness().build(), blank)
    assert value.item() == 0
    assert (gradient > 0).all()
    assert thickness(full).item() == pytest.approx(14, rel=0.02)
    dark = stroke(3, 30)
    faint = (dark + 1) / 2 - 1
    assert thickness(faint).item() == pytest.approx(thickness(dark).item(), rel=0.02)
    assert thickness(dark.roll((2, -1), (2, 3))).item() == pytest.approx(thickness(dark).item())
    assert thickness(dark.expand(1, 3, 28, 28)).item() == pytest.approx(thickness(dark).item())


@pytest.mark.parametrize("settings", [Ink(sign="less"), StrokeThickness(), StrokeThickness(sign="thinner")])
def test_gradient_against_finite_differences(settings: Any) -> None:
    x = torch.cat([images(2, 1, 5, 6), torch.full((1, 1, 5, 6), -1.0)])
    assert torch.autograd.gradcheck(settings.build(), x.requires_grad_())


# ---- png-size, jpeg-size


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", [PngSize(sign="larger"), JpegSize(sign="larger"), JpegSize(sign="larger", quality=20)])
def test_size_is_that_of_the_file(settings: Any, channels: int, tmp_path: Path) -> None:
    x = images(3, channels, 9, 12) * 1.5  # some of it outside [-1, 1]
    x[0] = 0.25
    sizes = settings.build()(x)
    for pixels, size in zip(to_pixels(x), sizes, strict=True):
        array = pixels[0].numpy() if channels == 1 else np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        image = Image.fromarray(array)
        assert image.mode == ("L" if channels == 1 else "RGB")
        path = tmp_path / ("image.png" if isinstance(settings, PngSize) else "image.jpg")
        image.save(path, **({} if isinstance(settings, PngSize) else {"quality": settings.quality}))
        assert size == path.stat().st_size
    assert (sizes[0] < sizes[1:]).all()  # a plain image compresses better than noise


def test_a_png_holds_the_image() -> None:
    """The size is that of a file with the right picture in it: same pixels, channels in order."""
    x = torch.tensor([1.0, -1.0, 0.2]).reshape(1, 3, 1, 1).expand(1, 3, 4, 6)
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (255, 0, 153)).save(buffer, "PNG")
    assert PngSize().build()(x).item() == -len(buffer.getvalue())


def test_sizes_grow_with_quality() -> None:
    x = images(1, 3, 16, 16)
    sizes = [JpegSize(sign="larger", quality=quality).build()(x).item() for quality in (10, 50, 95)]
    assert sizes == sorted(set(sizes))


def test_no_file_without_an_image() -> None:
    for settings in (PngSize(), JpegSize()):
        with pytest.raises(InputError, match=r"images \[batch, 1 or 3, height, width\], got \[2, 4, 8, 8\]"):
            settings.build()(torch.zeros(2, 4, 8, 8))
        with pytest.raises(InputError, match=r"got \[2, 2\]"):
            settings.build()(torch.zeros(2, 2))
        x = torch.zeros(3, 1, 8, 8)
        x[1, 0, 2, 2] = math.nan
        assert settings.build()(x).isnan().tolist() == [False, True, False]
    assert "quality must be less than or equal to 100" in problem("jpeg-size", quality=101)
    assert "quality must be greater than or equal to 1" in problem("jpeg-size", quality=0)


# ---- function


def test_a_function_from_the_current_directory(module: Callable[[str], str]) -> None:
    name = module("def brightness(x):\n    import pathlib\n    return x.mean((1, 2, 3))\n")
    reward = Function(path=f"{name}:brightness").build()
    x = images(3, 1, 4, 4)
    assert torch.equal(evaluate(reward, x), x.mean((1, 2, 3)))


def test_the_python_path_comes_first(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module("def f(x): return 'current directory'")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / f"{name}.py").write_text("def f(x): return 'Python path'")
    sys.path.insert(0, str(tmp_path / "installed"))
    assert Function(path=f"{name}:f").build()(torch.zeros(1)) == "Python path"


@pytest.mark.parametrize("path", ["", "module", "module:", ":function", "a b:c", "package/module.py:function", ".m:f", "m:f()"])
def test_a_path_that_is_none(path: str) -> None:
    assert problem("function", path=path) == f"reward: path: must read package.module:function, got {path!r}"


def test_a_function_that_cannot_be_had(module: Callable[[str], str]) -> None:
    name = module("brightness = abs\nlimit = 3\n_hidden = abs\n")
    with pytest.raises(InputError, match=r"rewards_of_mine has no 'britness', did you mean 'brightness'\?$"):
        Function(path=f"{name}:britness").build()
    with pytest.raises(InputError, match=r"has no 'zzz'; known: brightness$"):
        Function(path=f"{name}:zzz").build()
    with pytest.raises(InputError, match=r"'limit' must be a function, is int$"):
        Function(path=f"{name}:limit").build()
    with pytest.raises(InputError, match="there is no module 'rewards_of_yours' on the Python path or in "):
        Function(path="rewards_of_yours:f").build()
    with pytest.raises(InputError, match=r"there is no module 'rewards_of_mine\.deeper'"):
        Function(path=f"{name}.deeper:f").build()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nowhere_to_be_found", "cannot be imported .No module named 'nowhere_to_be_found'"),
        ("def f(:", "cannot be imported .SyntaxError"),
        ("1 / 0", "cannot be imported .ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_breaks(code: str, message: str, module: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match=message):
        Function(path=f"{module(code)}:f").build()


# ---- sum


def test_sum() -> None:
    settings = validate(
        Sum,
        {
            "rewards": [
                {"reward": {"name": "ink", "sign": "less"}, "weight": 3},
                {"reward": "stroke-thickness"},
                {"reward": {"name": "sum", "rewards": [{"reward": "ink", "weight": -0.5}]}, "weight": 2},
            ]
        },
        "reward",
    )
    x = images(3, 1, 8, 8)
    ink = ((x + 1) / 2).mean((1, 2, 3))
    torch.testing.assert_close(settings.build()(x), -3 * ink + thickness(x) - ink)
    assert settings.differentiable
    assert settings.description.startswith(
        "3 × (minus the mean brightness, from -1 (all ink) to 0 (blank)) + 1 × (mean thickness"
    )
    assert torch.autograd.gradcheck(settings.build(), x[:1, :, :5, :5].requires_grad_())


def test_a_sum_has_a_gradient_only_if_all_parts_have() -> None:
    settings = validate(Sum, {"rewards": [{"reward": "ink"}, {"reward": "png-size", "weight": 0.01}]}, "reward")
    assert not settings.differentiable
    x = images(2, 1, 8, 8)
    expected = Ink().build()(x) + 0.01 * PngSize().build()(x)
    torch.testing.assert_close(settings.build()(x), expected)
    with pytest.raises(InputError, match="no gradient"):
        value_and_gradient(settings.build(), x)


def test_wrong_sums(module: Callable[[str], str]) -> None:
    assert problem("sum") == "reward: rewards is missing"
    assert "rewards: needs at least one term" in problem("sum", rewards=[])
    message = problem("sum", rewards=[{"reward": "ink"}, {"reward": {"name": "ink", "sing": "less"}}])
    assert message == "reward: rewards.1.reward.sing is not a setting, did you mean 'sign'?"
    message = problem("sum", rewards=[{"reward": "inc"}])
    assert message == "reward: rewards.0.reward: there is no reward 'inc', did you mean 'ink'?"
    assert "rewards.0.weight must be a finite number" in problem("sum", rewards=[{"reward": "ink", "weight": math.inf}])
    name = module("def flat(x):\n    return x.mean()\n")
    with pytest.raises(InputError, match=r"one number per sample, shape \[2\], got \[\]"):
        validate(Sum, {"rewards": [{"reward": {"name": "function", "path": f"{name}:flat"}}]}, "reward").build()(
            images(2, 1, 4, 4)
        )
