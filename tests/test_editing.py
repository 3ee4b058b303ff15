"""Pipelines that edit pictures, against diffusers itself: their pictures, the methods, rewards of what was edited, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("diffusers")
from test_cli import call
from test_run_text_to_image import recipe_for, train
from test_text_to_image import euler, latents_of
from tiny_pipelines import tiny_pipeline
from tiny_scorers import tiny_clip

import tiltflow
from tiltflow import from_diffusers, load_text_to_image
from tiltflow.commands.sample import plan_pictures
from tiltflow.conditions import Item
from tiltflow.conditions.prompts import Prompts, read_prompts
from tiltflow.errors import InputError
from tiltflow.models.text_to_image import TextToImage
from tiltflow.pictures import batch_of, picture_of
from tiltflow.rewards.backbones.clip import Clip, pooled, resized
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.functions.prompted import told
from tiltflow.rewards.image_similarity import ImageSimilarity
from tiltflow.runs.doctor.sampler import difference_to_pipeline
from tiltflow.runs.export import export_run
from tiltflow.runs.recipe import shipped_recipes
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import read_yaml

SHORT, LONG = "make it red", "put two blue dogs on the sofa beside the window"


def picture(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    """Blotches of colour."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(256, (size[0] // 4, size[1] // 4, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(numbers).resize((size[1], size[0]))


def model_of(folder: Path, size: tuple[int, int] = (16, 16), **options: Any) -> TextToImage:
    return from_diffusers(
        tiny_pipeline("flux-kontext", folder), height=size[0], width=size[1], max_sequence_length=64, **options
    )


def theirs(model: TextToImage, prompts: list[str], images: list[Image.Image], latents: Tensor, output: str = "latent") -> Any:
    """What the pipeline itself draws, asked as an export asks it."""
    return model.pipeline(
        prompt=prompts, image=images, latents=latents.clone(), num_inference_steps=4, output_type=output,
        height=model.size[0], width=model.size[1], guidance_scale=model.guidance_scale,
        **model.family.arguments(model.size, 4), **model.encoding,
    ).images  # fmt: skip


@pytest.mark.parametrize("size", [pytest.param((16, 16), marks=pytest.mark.slow), (16, 32)])
def test_parity_with_the_pipeline(size: tuple[int, int], tmp_path: Path) -> None:
    """Of a batch of prompts of different length with a picture each, and of each of them alone."""
    model = model_of(tmp_path, size)
    latents, images = latents_of(model, 2), [picture(size, 1), picture(size, 2)]
    expected = theirs(model, [SHORT, LONG], images, latents)

    def ours(prompts: list[str], images: list[Any], latents: Tensor = latents) -> Tensor:
        return model.sample_latents(prompts, images=images, sampling=euler(4), latents=latents)

    worst = 1e-4 * expected.abs().max()
    assert (ours([SHORT, LONG], images) - expected).abs().max() < worst
    own = Sampling(scheduler="default", num_inference_steps=4)
    by_its_own = model.sample_latents([SHORT, LONG], images=images, sampling=own, latents=latents)
    assert (by_its_own - expected).abs().max() < worst
    alone = [ours([p], [i], x) for p, i, x in zip([SHORT, LONG], images, latents.split(1), strict=True)]
    assert (torch.cat(alone) - expected).abs().max() < worst
    other = [ours([LONG, SHORT], images), ours([SHORT, LONG], images[::-1])]
    assert all((found - expected).abs().amax((1, 2)).min() > 50 * worst for found in other)
    drawn = model.sample([SHORT, LONG], images=images, sampling=euler(4), latents=latents)
    pictures = 2 * theirs(model, [SHORT, LONG], images, latents, "pt") - 1
    assert (drawn.clamp(-1, 1) - pictures).abs().max() < 1e-4
    assert difference_to_pipeline(model) < 1e-5


def test_a_picture_is_resized_as_the_pipeline_resizes_it(tmp_path: Path) -> None:
    """Whatever it is given as: a path, an image with its orientation in its head, a tensor."""
    large, model = picture((64, 64)), model_of(tmp_path)
    processor = model.pipeline.image_processor
    expected = processor.preprocess(processor.resize(large, 16, 16))[0]
    large.rotate(90).save(turned := tmp_path / "turned.png", exif=_orientation(6))  # 6: to be turned by 90 degrees clockwise
    values = 2 * torch.tensor(list(large.tobytes())).reshape(64, 64, 3).permute(2, 0, 1) / 255 - 1
    for given in (large, turned, str(turned), values):
        found = picture_of(given, "here")
        assert found.size == (64, 64)
        assert torch.equal(found.pixels(16, 16), expected)
    assert picture_of(large, "") == picture_of(values, "") != picture_of(picture((64, 64), 1), "")
    large.crop((0, 0, 64, 32)).rotate(90, expand=True).save(turned, exif=_orientation(6))
    assert picture_of(turned, "").size == (32, 64)


def _orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def test_a_reward_gets_what_was_edited() -> None:
    """In the size of the images, for the samples that are selected."""
    one, two = (picture_of(picture(seed=seed), "") for seed in (1, 2))
    items = [Item(SHORT, {"image": each}) for each in (one, two, one)]
    x = torch.rand(3, 3, 8, 8)
    distance = told(from_function(lambda images, sources: (images - sources).square().mean((1, 2, 3))), items)
    expected = (x - batch_of([one, two, one], 8, 8)).square().mean((1, 2, 3))
    assert torch.equal(distance(x), expected)
    assert torch.equal(distance.select(torch.tensor([1, 2]))(x[1:]), expected[1:])  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="asks for sources, the pictures that were edited; this model edits none"):
        told(distance, [Item(SHORT)] * 3)(x)


def test_likeness_by_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 cos of transformers' own features, of each edit and what it is of; 100 for no edit. Features of what is edited are
    computed once for each size."""
    path = str(tiny_clip(tmp_path))
    one, two = (picture_of(picture((32, 32), seed), "") for seed in (1, 2))
    x = torch.stack([two.pixels(32, 32), two.pixels(32, 32)])
    reward = told(ImageSimilarity(model=path).build(), [Item(SHORT, {"image": each}) for each in (one, two)])
    clip = Clip.load(path)
    seen = [resized(each.pixels(32, 32)[None], 32) for each in (one, two)]
    with torch.no_grad():
        a, b = (pooled(clip.model.get_image_features(pixel_values=pixels))[0] for pixels in seen)
    expected = 100 * (a @ b) / (a.norm() * b.norm())
    torch.testing.assert_close(reward(x), torch.stack([expected, torch.tensor(100.0)]), rtol=1e-4, atol=1e-3)
    assert expected < 99.9
    gradient = torch.autograd.grad(reward(x.requires_grad_()).sum(), x)[0]
    assert gradient[0].abs().max() > 0
    counts, features = list[int](), Clip.image_features
    monkeypatch.setattr(Clip, "image_features", lambda clip, images: counts.append(len(images)) or features(clip, images))
    turned = told(reward, [Item(SHORT, {"image": each}) for each in (two, one)])
    assert torch.equal(turned(x.flip(0)), reward(x).flip(0))
    assert counts == [2, 2]
    reward(torch.rand(2, 3, 16, 16))
    assert counts == [2, 2, 2, 2]
    with pytest.raises(InputError, match="the reward asks for sources, the pictures that were edited; this model edits none"):
        told(reward, [Item(SHORT)] * 2)(x)


def test_one_cache_of_prompts_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is encoded once, whatever goes with it; bounded, pictures go before prompts, and nothing else changes."""
    whole = model_of(tmp_path)
    items = [Item(prompt, {"image": picture_of(picture(seed=i), "")}) for prompt in (SHORT, LONG) for i in range(3)]
    encoded: list[int] = []
    real = type(whole.family).encode_pictures
    monkeypatch.setattr(type(whole.family), "encode_pictures", lambda *given: encoded.append(len(given[2])) or real(*given))
    expected = whole.conditions(items)[0]
    assert encoded == [1, 1, 1]
    assert len(whole.encoder.cache) == 5
    sizes = [whole.encoder.cache[key].size for key in (SHORT, items[0].metadata["image"])]
    assert sizes[1] == expected["image_latents"][0].nbytes
    few = model_of(tmp_path, prompt_cache_gb=(2 * sizes[0] + sizes[1]) / 2**30)
    for each in (items, items[::-1]):
        found = few.conditions(each)[0]
        order = slice(None) if each is items else torch.arange(5, -1, -1)
        assert all(torch.equal(found[key], expected[key][order]) for key in expected)
        assert {SHORT, LONG} < few.encoder.cache.keys()
        assert len(few.encoder.cache) == 3


# ---- items ----


def test_pictures_of_files_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path begins in the folder of the file; what is held out is a prompt with its picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(4):
        picture(seed=i).save(folder / f"{i}.png")
    rows = [{"prompt": SHORT, "image": f"{i}.png", "mark": i} for i in range(4)]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "edits.json").write_text(
        json.dumps([{"prompt": SHORT, "source": row["image"], "mark": row["mark"]} for row in rows])
    )
    for settings in (
        Prompts(path=str(folder / "edits.jsonl"), image_column="image", validation=0.5),
        Prompts(path=str(folder / "edits.json"), image_column="source", validation=0.5),
    ):
        train, held_out = read_prompts(settings)
        assert len(train) == len(held_out) == 2
        for item in (*train, *held_out):
            assert item.metadata["image"].name == str(folder / f"{item.metadata['mark']}.png")
            assert torch.equal(
                item.metadata["image"].pixels(16, 16), picture_of(picture(seed=item.metadata["mark"]), "").pixels(16, 16)
            )
    plain, _ = read_prompts(Prompts(path=str(folder / "edits.jsonl"), validation=0))
    assert [item.metadata["image"] for item in plain] == [f"{i}.png" for i in range(4)]


def test_pictures_in_tables(tmp_path: Path) -> None:
    """Of a data set of `datasets`, each read when it is needed, and of a .parquet file."""
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": [SHORT, LONG], "source": [picture(seed=1), picture(seed=2)], "mark": [1, 2]}
    kinds = {"prompt": datasets.Value("string"), "source": datasets.Image(), "mark": datasets.Value("int64")}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    data.save_to_disk(tmp_path / "edits")
    data.to_parquet(tmp_path / "edits.parquet")
    for path in (tmp_path / "edits", tmp_path / "edits.parquet"):
        items, _ = read_prompts(Prompts(path=str(path), image_column="source", validation=0))
        assert [item.metadata["mark"] for item in items] == [1, 2]
        for i, item in enumerate(items, 1):
            expected = picture_of(picture(seed=i), "").pixels(16, 16)
            assert torch.equal(item.metadata["image"].pixels(16, 16), expected)
        without, _ = read_prompts(Prompts(path=str(path), validation=0))
        assert [item.metadata for item in without] == [{"mark": 1}, {"mark": 2}]
    with pytest.raises(InputError, match=r"row 1: has no picture 'sorce'; set prompts.image_column"):
        read_prompts(Prompts(path=str(tmp_path / "edits"), image_column="sorce"))


# ---- mistakes, in one line ----


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("missing.png", "tune: conditions: there is no picture .*missing.png"),
        ("words.png", "tune: conditions: .*words.png is not a picture"),
        (torch.zeros(16, 16), r"a picture is a path, an image of PIL or a tensor \[3, .*got a tensor \[16, 16\]"),
        (7, "a picture is a path, an image of PIL or a tensor .* got int"),
        (None, "prompt 'make it red': FluxKontextPipeline edits pictures, and it has none: prompts.image_column says"),
        (picture((16, 32)), "its picture sha256:.* is 32 x 16, and those that are drawn are 16 x 16: crop it"),
    ],
)
def test_a_wrong_picture_is_refused(given: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.png").write_text("no picture")
    training = tiltflow.Training(max_train_steps=1, prompts_per_step=1, num_generations=2, guidance_mode="none")
    conditions = [{"prompt": SHORT, "image": given}]
    with pytest.raises(InputError, match=said) as caught:
        tiltflow.tune(model_of(tmp_path), torch.mean, METHODS["adjoint-matching"], training, conditions=conditions)
    assert "\n" not in str(caught.value)


def test_other_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save(tmp_path / "in.png")
    model, plain = model_of(tmp_path), from_diffusers(tiny_pipeline("flux", tmp_path))
    with pytest.raises(InputError, match=r"FluxPipeline takes no picture, and it has .*in.png; leave it out"):
        plain.sample(["a"], images=["in.png"])
    with pytest.raises(InputError, match="images must be a list of 2 pictures, one for each prompt"):
        model.sample(["a", "b"], images=["in.png"])


def test_pictures_on_the_command_line(tmp_path: Path) -> None:
    """One for all prompts, or one for each."""
    model, paths = model_of(tmp_path), [tmp_path / "1.png", tmp_path / "2.png"]
    for i, path in enumerate(paths, 1):
        picture(seed=i).save(path)
    options = {"sampling": euler(2)}
    for images, names in (([paths[0]], [paths[0], paths[0]]), (paths, paths)):
        plan = plan_pictures(model, [SHORT, LONG], images, 2, None, options)
        assert plan.asked["images"] == list(map(str, names))
        expected = model.sample([SHORT, SHORT, LONG, LONG], images=[names[0], names[0], names[1], names[1]], sampling=euler(2))
        assert torch.equal(plan.draw(), expected)
    for wrong, said in (
        ([*paths, paths[0]], "--image: give one for all prompts, or one for each of 2, got 3"),
        ([tmp_path / "no.png"], "--image: there is no picture"),
        (None, "edits pictures, and it has none"),
    ):
        with pytest.raises(InputError, match=said):
            plan_pictures(model, [SHORT, LONG], wrong, 1, None, options)


# ---- training ----

FEW = {"num_inference_steps": 3}
METHODS: dict[str, Any] = {
    "adjoint-matching": tiltflow.AdjointMatching(**FEW),
    "score-as-action": tiltflow.ScoreAsAction(**FEW, estimator="return-minus-value"),
    "orw-cfm-w2": tiltflow.OrwCfmW2(**FEW, min_effective_sample_size=1),
    "tilt-matching": tiltflow.TiltMatching(**FEW),
}


def near_its_source(images: Tensor, sources: Tensor) -> Tensor:
    """Keep the rest."""
    return -(images - sources).square().mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_what_plain_diffusers_draws_of_it(method: str, tmp_path: Path) -> None:
    """Three updates, with a reward of what was edited; then the LoRA in the pipeline's own hands."""
    model, rows, edit = model_of(tmp_path), list[Any](), picture(seed=2)
    training = tiltflow.Training(max_train_steps=3, prompts_per_step=2, num_generations=2, guidance_mode="none")
    tuned = tiltflow.tune(
        model, near_its_source, METHODS[method], training, adapter=tiltflow.Adapter(rank=2),
        optimizer=tiltflow.Optimizer(learning_rate=1e-2, lr_warmup_steps=0), callbacks=[rows.append],
        conditions=[{"prompt": SHORT, "image": picture(seed=1)}, {"prompt": LONG, "image": edit}],
    )  # fmt: skip
    assert [row.step for row in rows] == [1, 2, 3]
    tuned.save(tmp_path / "lora")
    plain, latents = model_of(tmp_path), latents_of(tuned, 1)
    before = theirs(plain, [LONG], [edit], latents, "pt")
    plain.pipeline.load_lora_weights(tmp_path / "lora")
    after = theirs(plain, [LONG], [edit], latents, "pt")
    drawn = tuned.sample([LONG], images=[edit], sampling=euler(4), latents=latents)
    assert (drawn.clamp(-1, 1) - (2 * after - 1)).abs().max() < 1e-4
    assert (after - before).abs().max() > 1e-3


@pytest.mark.slow
def test_a_run_and_its_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From a recipe: its report shows what was edited, it is resumed unless a picture has changed, and the code of its card
    draws in plain diffusers what the run measured."""
    for i in range(3):
        picture(seed=i).save(tmp_path / f"{i}.png")
    rows = [{"prompt": (SHORT, LONG)[i % 2], "image": f"{i}.png"} for i in range(3)]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own_reward.py").write_text(
        "def near(images, sources):\n    return -(images - sources).square().mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = recipe_for(tmp_path, "flux-kontext")
    tree["prompts"] = {"path": str(tmp_path / "edits.jsonl"), "image_column": "image", "validation": 0.34}
    tree["reward"] = {"name": "function", "path": "own_reward:near"}
    tree["training"] |= {"guidance_mode": "none", "checkpointing_steps": 1}
    tree["optimizer"] |= {"lr_scheduler": "constant"}
    tree["evaluation"] = {"num_prompts": 1, "num_generations": 2, "points": [{"num_inference_steps": 2, "guidance_scale": 2.5}]}
    summary = train(tree, tmp_path / "run")
    assert summary["reward_tuned"] != summary["reward_base"]
    edit = Path(summary["pictures"]["images"][0])
    with Image.open(tmp_path / "run" / "before.png") as grid:  # what was edited, and then 2 samples, of 2 pixels a pixel
        first = picture_of(grid.crop((2, 2, 34, 34)).resize((16, 16), Image.Resampling.NEAREST), "")
    assert torch.equal(first.pixels(16, 16), picture_of(edit, "").pixels(16, 16))
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Each row begins with the picture that is edited" in report
    assert f"--image {edit}" in report

    tree["training"] |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    train(tree, tmp_path / "run")
    shown = edit.read_bytes()
    picture(seed=9).save(edit)
    with pytest.raises(InputError, match=r"what prompts\.images names has changed since the run was started"):
        train(tree, tmp_path / "run")
    edit.write_bytes(shown)
    ask = ("sample", str(tmp_path / "run"), "--prompt", LONG, "--image", str(edit), "--output", str(tmp_path / "out.png"))
    code, out, err = call(monkeypatch, capsys, *ask, "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == [str(edit)]

    export_run(tmp_path / "run", tmp_path / "exported")
    tuned, said = load_text_to_image(tmp_path / "run"), dict[str, Any]()
    latents, other = latents_of(tuned, 1), picture((32, 32), 5)
    monkeypatch.chdir(tmp_path / "exported")
    other.save("picture.png")
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, said)
    assert said["image"].size == (16, 16)
    pictures = said["pipeline"](
        prompt=LONG, image=said["picture"], latents=latents.clone(), output_type="pt", **said["sampling"]
    ).images
    drawn = tuned.sample([LONG], images=[other], sampling=euler(2), latents=latents)
    assert (drawn.clamp(-1, 1) - (2 * pictures - 1)).abs().max() < 1e-4


@pytest.mark.slow
def test_the_recipe_runs_on_a_small_pipeline(tmp_path: Path) -> None:
    """With another reward in place of a server's."""
    tree: Any = read_yaml(shipped_recipes("train")["flux-kontext-counting"])
    tiny_pipeline("flux-kontext", tmp_path).save_pretrained(tmp_path / "pipeline")
    clip = str(tiny_clip(tmp_path))
    for name, count in (("train", 3), ("test", 2)):
        rows = [{"prompt": f"{SHORT} {name} {i}", "image": f"{i}.png", "tag": "counting"} for i in range(count)]
        (tmp_path / f"{name}_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(3):
        picture((64, 64), i).save(tmp_path / f"{i}.png")
    tree["model"] |= {
        "diffusers": str(tmp_path / "pipeline"),
        "height": 16,
        "width": 16,
        "dtype": "float32",
        "adapter": {"rank": 2},
    }
    tree["prompts"] |= {"path": str(tmp_path / "train_metadata.jsonl"), "validation": str(tmp_path / "test_metadata.jsonl")}
    assert tree["reward"]["rewards"][1]["reward"]["name"] == "http"
    similarity, score = ({"name": name, "model": clip} for name in ("image-similarity", "clip-score"))
    tree["reward"]["rewards"] = [{"reward": similarity, "weight": 0.005}, {"reward": score, "weight": 0.005}]
    tree["training"] |= {"max_train_steps": 4, "prompts_per_step": 3, "num_generations": 2, "micro_batch_size": 3}
    tree["evaluation"] |= {"num_prompts": 2, "num_generations": 2, "features": clip, "rewards": [similarity, score]}
    tree["evaluation"]["points"] = [{**point, "num_inference_steps": 2} for point in tree["evaluation"]["points"]]
    summary = train(tree, tmp_path / "run")
    assert summary["iterations"] == 4
    assert {"sum", "image-similarity", "clip-score"} <= set(summary["table"][0])
