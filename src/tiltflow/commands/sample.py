"""`tiltflow sample`: draw samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiltflow.commands.terminal.console import escape, make_console, print_json, print_table, spinner
from tiltflow.commands.terminal.options import (
    AcceptChanges,
    AllowCode,
    Device,
    Json,
    NoiseSeed,
    Quiet,
    Threads,
    completes,
    set_up_torch,
)
from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.plugins import names

if TYPE_CHECKING:
    from torch import Tensor

    from tiltflow.models.model import Model
    from tiltflow.models.text_to_image import TextToImage
    from tiltflow.steering.drawing.steered import Steered

SOLVERS = names("samplers.solvers")
STEERING = names("steering")
SUFFIXES = (".png", ".gif", ".xyz", ".sdf", ".npz")


def model_names() -> Iterable[str]:
    """Return the names of the models that ship with tiltflow."""
    from tiltflow.models.model_folder import CONFIG
    from tiltflow.shipped import INDEX, assets

    return assets(INDEX, CONFIG)


def sample(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run, a model folder, or a shipped model.", autocompletion=completes(model_names)),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="File to write: a .png grid, of videos rows of frames; a .gif of videos; an .xyz or .sdf of molecules; or an"
            " .npz with the array `samples`.",
        ),
    ] = Path("samples.png"),
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples",
            "-n",
            min=1,
            help="Number of samples, for a pipeline of each prompt; with --steer of each class too.",
            show_default="64; 4 of a prompt",
        ),
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Prompt for a pipeline; may be repeated.")] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", help="Picture that a pipeline that edits edits: one for all prompts, or one for each, in their order."
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label", help="Class for a class-conditional model, by number or name; may be repeated.", show_default="all"
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="Guidance scale for a pipeline; 1 is no guidance.", show_default="the model's")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SOLVERS)}, or package.module:function.",
            show_default="the model's",
            autocompletion=completes(lambda: SOLVERS),
        ),
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of solver steps.", show_default="the model's")
    ] = None,
    tilt_strength: Annotated[
        float,
        typer.Option(
            min=0,
            help="Strength of a run's tilt: 0 is its base, 1 what was tuned. A LoRA is scaled, other weights lie between; a"
            " heuristic, and not the law at another temperature.",
        ),
    ] = 1.0,
    steer: Annotated[
        str | None,
        typer.Option(
            help=f"Steer by --reward, without training: {', '.join(STEERING)}, or a mapping with its name and settings.",
            autocompletion=completes(lambda: STEERING),
        ),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="For --steer: the name of a reward, or a mapping with its name and settings.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Number of samples at a time; the samples depend on it.", show_default="the model's"),
    ] = None,
    seed: NoiseSeed = 0,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw samples from a tuned model, or from a model that ships with tiltflow.

    [dim]tiltflow sample runs/even --num-samples 100 --output even.png[/dim]
    [dim]tiltflow sample runs/even --tilt-strength 0.5 --output half.png[/dim]
    [dim]tiltflow sample digits-flow --solver heun --num-inference-steps 10[/dim]
    [dim]tiltflow sample models/classes --label 3 --num-samples 16[/dim]
    [dim]tiltflow sample models/molecules --output molecules.sdf[/dim]
    [dim]tiltflow sample digits-flow --steer '{name: best-of-n, n: 8}' --reward '{name: ink}'[/dim]
    [dim]tiltflow sample runs/colour --prompt "a red cat" --num-samples 4 --output cat.png[/dim]
    [dim]tiltflow sample runs/edits --prompt "make it red" --image in.png --output red.png[/dim]
    """
    from torch import Tensor

    from tiltflow.api import load
    from tiltflow.files import check_output
    from tiltflow.models.text_to_image import TextToImage
    from tiltflow.samplers.sampling import Sampling
    from tiltflow.settings import validate

    if output.suffix not in SUFFIXES:
        raise InputError(f"--output {output}: must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    loaded, console = load(model, set_up_torch(device, threads), tilt_strength=tilt_strength), make_console(as_json)
    check_suffix(output, loaded.sample_shape)
    changes = {"solver": solver, "num_inference_steps": num_inference_steps}
    tree = loaded.sampling.model_dump() | {key: value for key, value in changes.items() if value is not None}
    sampling = validate(Sampling, tree, "sample")
    options: dict[str, Any] = {"seed": seed, "sampling": sampling} | ({} if batch_size is None else {"batch_size": batch_size})
    by = None if steer is None and reward is None else steering_by(steer, reward, loaded.device)
    if isinstance(loaded, TextToImage):
        if labels is not None:
            raise InputError(f"--label: {model} is a text-to-image pipeline; use --prompt")
        plan = plan_pictures(loaded, prompts, images, num_samples or 4, guidance_scale, options, by)
    else:
        for option, value in (("--prompt", prompts), ("--image", images), ("--guidance-scale", guidance_scale)):
            if value is not None:
                raise InputError(f"{option}: {model} is not a text-to-image pipeline; leave it out")
        plan = plan_samples(loaded, labels, num_samples or 64, options, by)
    check_output(output)
    with spinner(console, quiet, f"sampling {plan.count}"):
        drawn = plan.draw()
    found = None if isinstance(drawn, Tensor) else drawn
    write_samples(output, drawn if isinstance(drawn, Tensor) else drawn.samples, plan.columns)
    if not quiet:
        console.print(f"{plan.count} {plan.what} in {escape(output)}")
        if found is not None:
            print_table(console, steering_in_words(found), "steered")
    asked = {
        "tilt_strength": tilt_strength,
        **plan.asked,
        **sampling.model_dump(),
        **({} if found is None else steering_in_numbers(found)),
    }
    print_json(as_json, {"output": str(output), "num_samples": plan.count, "seed": seed, **asked})


Steer = Callable[..., "Steered"]
"""`tiltflow.steer` with its reward and steering."""


def steering_by(steer: str | None, reward: str | None, device: Any) -> Steer:
    """Read --steer and --reward. Raises InputError where one is missing or wrong."""
    from tiltflow.api import steer as draw
    from tiltflow.rewards import NamedReward
    from tiltflow.settings import Settings, parse_yaml, validate
    from tiltflow.steering import NamedSteering

    class Asked(Settings):
        steer: NamedSteering
        reward: NamedReward

    if steer is None or reward is None:
        given, missing = ("--reward", "--steer") if steer is None else ("--steer", "--reward")
        raise InputError(f"{given} needs {missing} too: what to steer by, and how")
    asked = validate(Asked, {"steer": parse_yaml(steer, "--steer"), "reward": parse_yaml(reward, "--reward")}, "sample")
    built = asked.reward.build(device)
    return lambda model, *arguments, **options: draw(model, built, asked.steer, *arguments, **options)


def steering_in_numbers(found: Steered) -> dict[str, Any]:
    """What steering found, for --json."""
    from dataclasses import asdict

    numbers = {key: value for key, value in asdict(found).items() if key not in ("samples", "rewards", "conditions")}
    return {"rewards": found.rewards.tolist(), **numbers}


def steering_in_words(found: Steered) -> dict[str, str]:
    """What steering found, as rows of a table."""
    sizes = found.effective_sample_sizes
    return {
        "law": found.law,
        "mean reward": f"{found.rewards.mean().item():.4g}",
        "effective sample size": f"{min(sizes):.1f}" if len(sizes) == 1 else f"{min(sizes):.1f} to {max(sizes):.1f}",
        "cost": f"{found.network_evaluations:,} network evaluations, {found.reward_evaluations:,} rewards",
        **({"note": " ".join(found.notes)} if found.notes else {}),
    }


@dataclass(frozen=True)
class Plan:
    """Samples to draw.

    Args:
        draw: draws the samples [count, *event], or steered ones.
        count: number of samples.
        what: noun for them.
        columns: number of columns of a .png grid.
        asked: their conditions, for --json.
    """

    draw: Callable[[], Tensor | Steered]
    count: int
    what: str
    columns: int
    asked: dict[str, Any]


def plan_pictures(
    model: TextToImage,
    prompts: list[str] | None,
    images: list[Path] | None,
    each: int,
    guidance_scale: float | None,
    options: dict[str, Any],
    by: Steer | None = None,
) -> Plan:
    """Plan `each` pictures or videos of each prompt, one row of the grid per prompt. Raises InputError without a prompt, and
    for pictures to edit that are too few or too many, or that the pipeline does not take."""
    from tiltflow.pictures import IMAGE, picture_of

    if not prompts:
        raise InputError('--prompt: a pipeline needs at least one, for example --prompt "a red cat"')
    asked = {"prompts": prompts, "guidance_scale": model.guidance_scale if guidance_scale is None else guidance_scale}
    several = [prompt for prompt in prompts for _ in range(each)]
    if images is not None and len(images) not in (1, len(prompts)):
        raise InputError(f"--image: give one for all prompts, or one for each of {len(prompts)}, got {len(images)}")
    given = [picture_of(path, "--image") for path in images or ()] * (len(prompts) // len(images) if images else 1)
    model.encode_ahead([Item(prompt, {IMAGE: given[i]} if given else {}) for i, prompt in enumerate(prompts)])
    if given:
        asked["images"] = [str(picture) for picture in given]
        options = options | {"images": [picture for picture in given for _ in range(each)]}
    draw: Callable[[], Tensor | Steered] = partial(model.sample, several, guidance_scale=guidance_scale, **options)
    if by is not None:
        rows = [{"prompt": prompt, **({IMAGE: given[i]} if given else {})} for i, prompt in enumerate(prompts)]
        options.pop("images", None)
        draw = partial(by, model, each, conditions=rows, guidance_scale=guidance_scale, **options)
    return Plan(draw, len(several), "pictures" if model.num_frames is None else "videos", each, asked)


def plan_samples(model: Model, labels: list[str] | None, count: int, options: dict[str, Any], by: Steer | None = None) -> Plan:
    """Plan `count` samples, of the labels in turn, in a square grid; steered ones of each label, one after the other."""
    if by is not None:
        classes = len(set(labels)) if labels else max(1, len(model.class_names))
        given = {} if labels is None else {"labels": labels}
        steered = partial(by, model, count, conditions=labels, **options)
        return Plan(steered, count * classes, "samples", max(1, round(count**0.5)) if classes == 1 else count, given)
    in_turn = None if labels is None else [labels[i % len(labels)] for i in range(count)]
    draw = partial(model.sample, count, labels=in_turn, **options)
    return Plan(draw, count, "samples", max(1, round(count**0.5)), {} if labels is None else {"labels": labels})


def check_suffix(output: Path, shape: tuple[int, ...]) -> None:
    """Raise InputError for a file of another kind than the samples of this shape: a .gif is of videos, an .xyz and an .sdf of
    molecules, a .png of any of these and of pictures, and an .npz of all."""
    from tiltflow.evaluation.molecules import is_molecule
    from tiltflow.evaluation.pictures import is_video
    from tiltflow.reports.drawn import can_be_drawn

    shown = can_be_drawn(shape)
    kinds = {".png": ("pictures", shown), ".gif": ("videos", is_video(shape)), ".npz": ("samples", True)}
    what, fits = kinds.get(output.suffix, ("molecules", is_molecule(shape)))
    if not fits:
        use = ".png or .npz" if shown else ".npz"
        raise InputError(f"--output {output}: samples of shape {list(shape)} are not {what}; use {use}")


def write_samples(output: Path, x: Tensor, columns: int) -> None:
    """Write samples [count, *event] atomically to a .png grid, of videos their frames in rows, of molecules drawings; or to a
    .gif, an .xyz, an .sdf or an .npz file."""
    import numpy as np

    from tiltflow.chemistry.atoms import molecules_of
    from tiltflow.chemistry.molecule_files import to_sdf, to_xyz
    from tiltflow.files import write_file
    from tiltflow.reports.drawn import drawn
    from tiltflow.reports.videos import save_gif

    def write(draft: Path) -> None:
        with open(draft, "wb") as file:
            if output.suffix == ".gif":
                save_gif(x, columns, file)
            elif output.suffix == ".npz":
                np.savez_compressed(file, samples=x.numpy())
            elif output.suffix == ".png":
                drawn(x, columns).save(file, "PNG")
            else:
                file.write((to_xyz if output.suffix == ".xyz" else to_sdf)(molecules_of(x)).encode())

    write_file(output, write)
