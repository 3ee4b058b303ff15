"""Data sets and pretraining on a few synthetic images."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tiltflow import plugins
from tiltflow.data import ImageData, load_images, to_pixels
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.flows.interpolant import Cosine
from tiltflow.models.model import load
from tiltflow.models.model_folder import load_classifier
from tiltflow.networks.mlp import Mlp
from tiltflow.networks.plain_classifier import PlainClassifier
from tiltflow.pretraining.loop import Progress, train
from tiltflow.pretraining.recipe import kind_of, pretraining_of, read_pretraining
from tiltflow.pretraining.run import run_pretraining
from tiltflow.pretraining.tasks.classifier import ClassifierPretraining, classifier_loss, classifier_scores
from tiltflow.pretraining.tasks.flow import FlowPretraining, FlowTask, flow_loss
from tiltflow.runs.describe import settings_of
from tiltflow.runs.recipe import shipped_recipes
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network, stream


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Two classes of 8x8 images, dark and bright."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    images = (labels[:, None, None] * 150 + rng.integers(0, 100, (64, 8, 8))).astype(np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:32], y_test=labels[:32])
    return path


def test_npz_and_folder_hold_the_same_images(npz: Path, tmp_path: Path) -> None:
    data = load_images(npz)
    assert data.labels is not None
    assert data.images.min() >= -1
    assert data.images.max() <= 1
    for i, (pixels, label) in enumerate(zip(to_pixels(data.images), data.labels.tolist(), strict=True)):
        folder = tmp_path / "folder" / "train" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(folder / f"{i:03}.png")
    again = load_images(tmp_path / "folder")
    assert again.class_names == ("class0", "class1")
    assert again.labels is not None
    order = torch.argsort(data.labels, stable=True)
    torch.testing.assert_close(again.images, data.images[order], rtol=0, atol=0)
    assert torch.equal(again.labels, data.labels[order])


def test_unreadable_data_is_one_line(npz: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such data set"):
        load_images(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"bad\.npz: not a readable \.npz file"):
        load_images(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(InputError, match="holds images, but no x_train"):
        load_images(tmp_path / "other.npz")
    np.savez(tmp_path / "float.npz", x_train=np.zeros((2, 8, 8)))
    with pytest.raises(InputError, match="images must be uint8"):
        load_images(tmp_path / "float.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        load_images(tmp_path / "empty")


def test_regressing_a_known_velocity_reaches_its_conditional_mean() -> None:
    """Data N(0, 1) on the cosine path: x_t is standard normal at every time and independent of its velocity, whose mean
    is therefore zero, and whose variance, (pi / 2)^2, is the least mean squared error."""
    recipe = FlowPretraining(network=Mlp(dimension=1), interpolant=Cosine())
    network = new_network(recipe.network, 0)  # zero at the start
    loss = flow_loss(recipe, network, torch.randn(100_000, 1, generator=stream(0, "x")), stream(0, "t"))
    exact = (torch.pi / 2) ** 2
    # the variance of a squared N(0, exact) variable is 2 exact^2
    assert abs(loss.item() - exact) < 4 * exact * (2 / 100_000) ** 0.5


@pytest.mark.parametrize("noise", [(0.0, 0.0), (0.5, 1.0), (2.0, 2.0)])
def test_a_classifier_sees_noise_of_the_level_asked_for(noise: tuple[float, float]) -> None:
    recipe = ClassifierPretraining(network=PlainClassifier(), noise=noise, max_shift=0)
    seen = []

    def network(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 10)

    classifier_loss(recipe, network, torch.zeros(400, 1, 28, 28), torch.zeros(400, dtype=torch.long), stream(0, "noise"))
    levels = seen[0].flatten(1).std(1)
    low, high = noise
    # the deviation of 784 draws is off by a factor 1 + N(0, 1 / 1568)
    assert low * 0.9 <= levels.min() <= levels.max() <= high * 1.1
    error = ((high - low) ** 2 / 12 + high**2 / 1568) ** 0.5 / 400**0.5
    assert abs(levels.mean() - (low + high) / 2) <= 4 * error


def test_a_classifier_and_a_flow_learn_and_are_written(npz: Path, tmp_path: Path) -> None:
    small = ["training.max_train_steps=40", "training.train_batch_size=16", "max_shift=0", "noise=[0, 0]"]
    judge = read_pretraining("digits-judge", [*small, "network.image_size=8", "network.classes=2"])
    scores = run_pretraining(judge, npz, tmp_path / "judge", name="tiny-judge")
    assert scores["test_accuracy"] > 0.95  # the classes do not overlap
    assert load_classifier(tmp_path / "judge")[1].class_names == ("0", "1")
    flow = read_pretraining(
        "digits-flow", ["training.max_train_steps=3", "network.channels=[8, 8]", f"judge={tmp_path / 'judge'}"]
    )
    scores = run_pretraining(flow, npz, tmp_path / "flow", name="tiny-flow")
    assert scores["frechet_distance_heun"] > 0
    assert sum(scores["class_fractions_heun"]) == pytest.approx(1, abs=0.002)
    assert not any(key.startswith("label_agreement") for key in scores)  # the flow has no classes
    assert load(tmp_path / "flow").event_shape == (1, 8, 8)
    assert "seed 0" in (tmp_path / "flow" / "README.md").read_text()
    with pytest.raises(InputError, match="already holds something"):
        run_pretraining(flow, npz, tmp_path / "flow", name="tiny-flow")


def test_a_judge_or_a_test_split_that_does_not_fit_is_found_before_training(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltflow.pretraining.run.train", lambda *arguments: pytest.fail("trained"))
    flow, small = "digits-flow", ["training.max_train_steps=3", "network.channels=[8, 8]"]
    arrays = dict(np.load(npz))
    np.savez(tmp_path / "sizes.npz", **arrays | {"x_test": arrays["x_test"][:, :4]})
    np.savez(tmp_path / "unlabelled.npz", **{key: value for key, value in arrays.items() if key != "y_test"})
    classifier = ["training.max_train_steps=3", "network.image_size=8", "network.classes=2"]
    for name, data, settings, said in (
        (flow, npz, [*small, "judge=digits-judge"], "judge digits-judge: does not take samples of shape .1, 8, 8."),
        (flow, npz, [*small, "judge=nobody"], "there is no model 'nobody'"),
        (flow, tmp_path / "sizes.npz", [*small, "judge=null"], "x_test are .1, 4, 8., x_train .1, 8, 8."),
        ("digits-judge", tmp_path / "unlabelled.npz", classifier, "has no labels of x_test"),
    ):
        with pytest.raises(InputError, match=said) as error:
            run_pretraining(read_pretraining(name, settings), data, tmp_path / "model", name="m")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "model").exists()


def test_scores_that_cannot_be_had_do_not_lose_the_model(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(FlowTask, "scores", fails)
    flow = read_pretraining("digits-flow", ["training.max_train_steps=3", "network.channels=[8, 8]", "judge=null"])
    with pytest.raises(MemoryError):
        run_pretraining(flow, npz, tmp_path / "flow", name="tiny-flow")
    assert load(tmp_path / "flow").sample(2).shape == (2, 1, 8, 8)
    assert "training_loss" in (tmp_path / "flow" / "README.md").read_text()
    assert not list((tmp_path / "flow").glob(".*"))


def test_a_class_conditional_flow_learns_a_law_for_each_class(npz: Path, tmp_path: Path) -> None:
    """Dark and bright images: mean -.61 and .57 of the pixels; the wrong number of classes, or no labels, is one line."""
    unet = {"name": "unet", "channels": [8, 8], "blocks": [1, 1], "embedding": 8}
    training = {"max_train_steps": 250, "train_batch_size": 32, "learning_rate": 1e-2, "lr_warmup_steps": 5, "ema_decay": 0.9}

    def recipe(classes: int) -> FlowPretraining:
        return FlowPretraining.model_validate({"network": unet | {"num_classes": classes}, "training": training})

    run_pretraining(recipe(2), npz, tmp_path / "m", name="mine")
    model = load(tmp_path / "m")
    assert model.class_names == ("0", "1")
    data = load_images(npz)
    assert data.labels is not None
    for label in (0, 1):
        x = model.sample(64, labels=label, sampling=Sampling(solver="heun", num_inference_steps=10))
        assert abs(x.mean() - data.images[data.labels == label].mean()) < 0.25
    with pytest.raises(InputError, match=r"network\.num_classes is 3, .* has 2 classes"):
        run_pretraining(recipe(3), npz, tmp_path / "n", name="mine")
    assert not (tmp_path / "n").exists()


def test_the_same_seed_is_the_same_network_bit_for_bit(npz: Path) -> None:
    """The network has dropout, which draws from torch's global generator: that plays no part, and is put back."""
    recipe = read_pretraining("digits-judge", ["training.max_train_steps=3", "network.image_size=8", "network.classes=2"])
    weights = []
    for _ in range(2):
        torch.rand(7)
        before = torch.random.get_rng_state()
        task = recipe.prepare(npz, "cpu")
        list(train(task.stages(), recipe.seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        weights.append(torch.cat([p.flatten() for p in task.networks["plain-classifier"].parameters()]))
    assert torch.equal(*weights)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(npz: Path) -> None:
    task = read_pretraining("digits-flow", ["network.channels=[8, 8]", "judge=null"]).prepare(npz, "cpu")
    assert isinstance(task, FlowTask)
    task.train.images[:] = float("nan")
    network = task.network
    before = [parameter.clone() for parameter in network.parameters()]
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        list(train(task.stages(), 0))
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new)


def test_wrong_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no recipe 'digits-flo', did you mean 'digits-flow'"):
        read_pretraining("digits-flo", [])
    with pytest.raises(InputError, match="is a recipe for `tiltflow train`"):
        read_pretraining("digits-even", [])
    (tmp_path / "r.yaml").write_text("task: clasifier\n")
    with pytest.raises(InputError, match=r"task must be .* or 'text-to-image', did you mean 'classifier'.* .got 'clasifier'."):
        read_pretraining(str(tmp_path / "r.yaml"), [])


@pytest.mark.parametrize(
    ("recipe", "setting", "why"),
    [
        ("digits-class-flow", "prompt_dropout=0.1", "prompt_dropout has no meaning here: .* none for no class"),
        ("digits-judge", "judge=digits-judge", "judge has no meaning here: a classifier is scored by its accuracy"),
        ("tiles-pipeline", "judge=digits-judge", "judge has no meaning here: the pictures have captions and no classes"),
        ("tiles-pipeline", "judg=digits-judge", "judg is not a setting"),
    ],
)
def test_what_has_a_meaning_in_another_task_alone_is_refused_with_the_reason(recipe: str, setting: str, why: str) -> None:
    with pytest.raises(InputError, match=f"^{recipe}: {why}") as error:
        read_pretraining(recipe, [setting])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", shipped_recipes("pretrain"))
def test_what_a_task_refuses_are_settings_of_another_one(name: str) -> None:
    kind, others = type(read_pretraining(name, [])), set()
    for task in plugins.names("pretraining.tasks"):
        others |= set(kind_of(task).model_fields)
    assert set(kind.ELSEWHERE) <= others - set(kind.model_fields)


def test_a_task_of_another_package_is_found_by_its_entry_point(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with `RECIPE`: it is trained, written and described like tiltflow's own."""
    (tmp_path / "mean_task.py").write_text(
        """
from typing import Literal
from tiltflow.pretraining.images import ImagePretraining, ImageTask, load_splits
from tiltflow.streams import new_network

class MeanPretraining(ImagePretraining):
    "A network of the mean of the images."
    task: Literal["mean"] = "mean"
    def prepare(self, path, device):
        return MeanTask(self, new_network(self.network, self.seed), *load_splits(path))

class MeanTask(ImageTask):
    def loss(self, images, labels, generator):
        return (self.network(images).mean() - images.mean()) ** 2
    def save(self, folder, card):
        (folder / "README.md").write_text(card)
    def scores(self):
        return {"images": float(len(self.test))}

RECIPE = MeanPretraining
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("mean", "mean_task", "tiltflow.pretraining.tasks")
    monkeypatch.setattr(plugins, "entries", lambda package: {"mean": entry} if package == "pretraining.tasks" else {})
    network = {"name": "plain-classifier", "image_size": 8}
    recipe = pretraining_of({"task": "mean", "network": network, "training": {"max_train_steps": 2}}, "mine")
    scores = run_pretraining(recipe, npz, tmp_path / "out", name="mine")
    assert set(scores) == {"training_loss", "images"}
    assert "| images | 32 |" in (tmp_path / "out" / "README.md").read_text()
    assert "recipe of `tiltflow pretrain`, task mean" in settings_of("mean")


def test_there_is_room_before_a_pipeline_is_trained(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr("tiltflow.files.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr("tiltflow.pretraining.run.train", lambda *arguments: pytest.fail("trained"))
    np.savez(tmp_path / "tiles.npz", images=np.zeros((2, 32, 32, 3), np.uint8), names=np.array(["mon/a", "item/b"]))
    for name, data, small in (
        ("tiles-pipeline", tmp_path / "tiles.npz", ["unet_channels=[16, 16]"]),
        ("digits-flow", npz, ["judge=null"]),
    ):
        with pytest.raises(InputError, match=r"the disk has 0\.0 MB left"):
            run_pretraining(read_pretraining(name, small), data, tmp_path / "out", name=name)
        assert not (tmp_path / "out").exists()


def test_a_pipeline_from_captioned_pictures(tmp_path: Path) -> None:
    """Of diffusers' own classes, in miniature: it is written, its tokenizer knows the words, and tiltflow reads it."""
    pytest.importorskip("diffusers")
    from tiltflow import from_diffusers
    from tiltflow.pretraining.tasks.text_to_image import PipelinePretraining

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 16, 16, 4), dtype=np.uint8)
    images[0, ..., 3] = 0
    names = [f"mon/undead/bone_dragon{i}" if i % 2 else f"item/sword_{i}" for i in range(6)]
    np.savez(tmp_path / "tiles.npz", images=images, names=np.array(names))
    few = {"max_train_steps": 2, "train_batch_size": 3}
    recipe = PipelinePretraining(
        description="tiny",
        include=("mon/", "item/"),
        least_opaque=0.1,
        vocabulary=300,
        vae_channels=(8, 8),
        unet_channels=(16, 16),
        text_width=16,
        text_layers=1,
        backgrounds={"red": (255, 0, 0), "blue": (0, 0, 255)},
        autoencoder=few,
        training=few,
    )
    seen: list[Progress] = []
    scores = run_pretraining(
        recipe,
        tmp_path / "tiles.npz",
        tmp_path / "out",
        name="tiny",
        watch=seen.append,
    )
    assert set(scores) == {"autoencoder_loss", "denoiser_loss"}
    assert [(progress.step, progress.samples) for progress in seen] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert [progress.stage for progress in seen] == ["autoencoder"] * 2 + ["denoiser"] * 2
    assert 0 < seen[0].seconds < seen[-1].seconds < 60
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 pictures, 2 backgrounds" in card  # the transparent one is left out
    assert "undead bone dragon on a red background" in card or "sword on a red background" in card
    model = from_diffusers(tmp_path / "out")
    assert model.sample(["sword on a blue background"], sampling=Sampling(solver="euler", num_inference_steps=2)).shape == (
        1,
        3,
        16,
        16,
    )
    assert model.flow.interpolant.rescale_betas_zero_snr  # type: ignore[union-attr]
    assert model.own_grid(4)[0] == 0  # pure noise
    with pytest.raises(InputError, match="already holds something"):
        run_pretraining(recipe, tmp_path / "tiles.npz", tmp_path / "out", name="tiny")


def test_the_same_captions_are_the_same_tokenizer() -> None:
    """The trainer of `tokenizers` numbers what it meets in an order that is drawn anew for each tokenizer."""
    pytest.importorskip("transformers")
    from tiltflow.pretraining.tasks.text_to_image import learn_tokenizer

    things = [f"{kind} {thing}" for kind in ("undead", "wooden", "iron") for thing in ("dragon", "sword", "axe", "shield")]
    captions = [f"{thing} on a {colour} background" for thing in things for colour in ("red", "blue", "green")]
    first, *others = (learn_tokenizer(captions, 330).get_vocab() for _ in range(4))
    assert first["dragon</w>"] > first["n</w>"]
    assert all(other == first for other in others)


def test_pictures_on_a_background() -> None:
    from tiltflow.data import CaptionedImages
    from tiltflow.pretraining.tasks.text_to_image import compose

    half = torch.full((1, 4, 1, 2), 1.0)
    half[0, 3, 0, 1] = -1  # white, opaque on the left, transparent on the right
    out = compose(CaptionedImages(half, ["x"]), torch.tensor([0]), torch.tensor([[1.0, -1.0, 0.5]]))
    assert out[0, :, 0].T.tolist() == [[1, 1, 1], [1, -1, 0.5]]


@pytest.mark.parametrize(
    ("arrays", "include", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, (), "no names"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "names": np.array(["a/b", "a/c"])}, (), "needs images"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "names": np.array(["a/b"])}, (), "as many names"),
        (
            {"images": np.zeros((1, 4, 4, 3), np.uint8), "names": np.array(["a/b"])},
            ("mon/",),
            "no name begins with mon/; there are a",
        ),
    ],
)
def test_captioned_pictures_that_cannot_be_read(arrays: Any, include: Any, message: str, tmp_path: Path) -> None:
    from tiltflow.data import load_captioned

    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_captioned(tmp_path / "x.npz", include=include)


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v", "x1"])
def test_the_loss_of_one_point_is_zero_at_its_exact_prediction(prediction: str) -> None:
    """Data that are all 0.7: x_0 = (X - alpha 0.7) / beta is known from X, and with it what every network should say."""
    recipe = FlowPretraining.model_validate(
        {"network": Mlp(dimension=1), "interpolant": Cosine(), "prediction": prediction}, strict=False
    )

    class Exact(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            c = Cosine()(time.double())
            x0 = (x - c.alpha[:, None] * 0.7) / c.beta[:, None]
            a, b = {
                "velocity": (c.d_alpha, c.d_beta),
                "epsilon": (0 * c.alpha, 1 + 0 * c.alpha),
                "v": (-c.beta, c.alpha),
                "x1": (1 + 0 * c.alpha, 0 * c.alpha),
            }[prediction]
            return (a[:, None] * 0.7 + b[:, None] * x0).float()

    x1 = torch.full((64, 1), 0.7)
    assert flow_loss(recipe, Exact(), x1, stream(0, "test")).item() < 1e-5
    assert flow_loss(recipe, Exact(), -x1, stream(0, "test")).item() > 0.01


def test_a_classifier_is_scored_under_noise_of_a_standard_deviation_of_three_tenths() -> None:
    seen: list[Tensor] = []

    class Watching(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros(len(x), 2)

    images = ImageData(torch.zeros(500, 1, 4, 4), torch.zeros(500, dtype=torch.long), ("0", "1"))
    assert set(classifier_scores(Watching(), images).values()) == {1}  # all are of class 0, and nothing speaks for another one
    spreads = sorted(float(x.std()) for x in seen)
    assert spreads[0] == 0
    assert spreads[-1] == pytest.approx(0.3, rel=0.05)


def test_images_are_shifted_by_every_distance_up_to_the_greatest() -> None:
    recipe = ClassifierPretraining(network=PlainClassifier(), max_shift=2)
    images, seen = torch.zeros(400, 1, 8, 8), []
    images[:, :, 4, 4] = 1

    def network(shifted: Tensor) -> Tensor:
        seen.extend(divmod(int(place), 8) for place in shifted.flatten(1).argmax(1))
        return torch.zeros(len(shifted), 10)

    classifier_loss(recipe, network, images, torch.zeros(400, dtype=torch.long), stream(0, "shift"))
    assert set(seen) == {(row, column) for row in range(2, 7) for column in range(2, 7)}


def test_noise_from_zero_up_is_added_too() -> None:
    recipe = ClassifierPretraining(network=PlainClassifier(), noise=(0.0, 0.5), max_shift=0)
    seen: list[Tensor] = []

    class Watching(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros(len(x), 2)

    labels = torch.zeros(32, dtype=torch.long)
    classifier_loss(recipe, Watching(), torch.zeros(32, 1, 4, 4), labels, stream(0, "test"))
    assert 0.1 < float(seen[0].std()) < 0.5
