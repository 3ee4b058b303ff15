"""The command line: parse, build, loop, write. Each command does what one function of the library does.

With --json the last line on standard output is one JSON object and all else goes to standard error. Exit code 0 is
success, 2 wrong input, 1 failure, and 128 + n after signal n: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1.
TILTFLOW_TRACEBACK=1 in the environment shows where an error comes from, beside its one line.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import markup
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from tiltflow import __version__
from tiltflow.errors import InputError, Interrupted, Note, TiltflowError, did_you_mean, redacted, visible

app = typer.Typer(
    name="tiltflow",
    help="Fine-tune flow-matching and diffusion models so that they sample [bold]p_base(x) exp(r(x) / beta)[/bold], "
    "and see how close it came.\n\nStart with: [cyan]tiltflow train digits-even --output runs/even[/cyan]",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def escape(text: object) -> str:
    """What is not ours, in a line of ours: no markup, no control characters, no passwords. Nothing else is printed without."""
    return markup.escape(visible(redacted(str(text))))


def _completes(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What the shell offers for a word that has begun; names are looked up then, not when the program starts."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _recipes(kind: Literal["train", "pretrain"]) -> Callable[[], Iterable[str]]:
    def names() -> Iterable[str]:
        from tiltflow.runs.recipe import shipped_recipes

        return shipped_recipes(kind)

    return names


def _topics() -> Iterable[str]:
    from tiltflow.runs.describe import topics

    return topics()


def _models() -> Iterable[str]:
    from tiltflow.models.model import CONFIG
    from tiltflow.shipped import INDEX, assets

    return assets(INDEX) | assets(CONFIG)


METHODS = ("adjoint-matching", "orw-cfm-w2", "score-as-action")
SOLVERS = ("memoryless", "memoryless-offset", "ddpm", "ddim", "euler", "euler-maruyama", "heun", "dpm-solver++")
PROBLEMS = ("gaussian", "lqg", "mixture", "two-modes")
"""Copies of the library's names: to import it takes seconds, which --help and the shell do not have. A test compares them."""

TrainRecipe = Annotated[
    str, typer.Argument(help="A recipe of `tiltflow recipes`, or a .yaml file.", autocompletion=_completes(_recipes("train")))
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a setting, checked like the recipe itself; see `tiltflow settings`."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line; all else goes to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed; the same one gives the same run, bit for bit.", show_default="the recipe's")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: the best there is.")]


def _consent(context: typer.Context, given: bool) -> bool:
    if given:
        from tiltflow.plugins import allow_code

        context.with_resource(allow_code())
    return given


AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", callback=_consent, help="Run code that lies in the folder of a run, if its recipe names some."
    ),
]


def _acceptance(context: typer.Context, given: bool) -> bool:
    if given:
        from tiltflow.runs.fingerprints import accept_changes

        context.with_resource(accept_changes())
    return given


AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        callback=_acceptance,
        help="Go on although the base, the prompts or the reward of the run are not what they were.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")]


@app.command()
def train(
    recipe: TrainRecipe,
    output: Output,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output from its latest checkpoint, or begin it.")
    ] = False,
    overrides: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tune a model toward a reward, and report how far it is from its target law.

    A recipe can run code, the Python functions that it names: use those of people whom you trust. Code in the folder of a run
    is not run without --allow-code.

    Everything lands in one folder: recipe, metrics, weights, pictures, summary.json and report.html. Ctrl-C, SIGTERM,
    SIGHUP and SIGUSR1 save; the same command with --resume then goes on, bit for bit as if it had never stopped.

    [dim]tiltflow train digits-even --output runs/even[/dim]
    [dim]tiltflow train digits-even --output runs/even --resume[/dim]
    [dim]accelerate launch -m tiltflow train mine.yaml --output runs/mine[/dim]
    [dim]tiltflow train digits-even --output runs/mine --set method.beta=3 --set reward.classes=1,7[/dim]
    """
    from tiltflow import processes
    from tiltflow.api import read_recipe, run
    from tiltflow.runs.checkpoint import FOLDER, checkpoints
    from tiltflow.runs.recipe import find_recipe, read_recipe_tree

    path = find_recipe(recipe, "train")
    going_on = ["training.resume_from_checkpoint=latest"] if resume else []
    settings = read_recipe(read_recipe_tree(path, [*_with_seed(overrides, seed), *going_on]), recipe)
    console, quiet = _console(as_json), quiet or not _speaks()

    def note(text: str) -> None:
        with suppress(OSError):  # of a terminal that was closed: no reason to stop
            console.print(f"[yellow]{escape(text)}[/yellow]")

    chosen = processes.begin(_device(device, threads), note)
    if not quiet:
        console.print(f"[bold]{escape(settings.description or path.stem)}[/bold]")

    batch, several = settings.training.train_batch_size, processes.count()
    if batch % several:
        each = processes.share_of(batch)
        note(
            f"{several} processes cannot share {batch} samples evenly: each does {each}, so that some are done twice;"
            f" a batch of {each * several} costs the same"
        )
    try:
        with _progress(console, quiet, settings.training.max_train_steps, settings.training.train_batch_size) as watch:
            summary = run(settings, output, device=chosen, watch=watch, note=note, handle_signals=True)
    except Interrupted as error:
        does = "goes on" if checkpoints(output / FOLDER) else "begins; nothing was saved"
        console.print(f"{escape(str(error))}; the same command with --resume {does}")
        processes.end()
        raise typer.Exit(128 + error.signal) from None
    processes.end()
    _show_summary(console, summary, output)
    _finish(as_json, summary)


@app.command()
def doctor(
    recipe: TrainRecipe,
    overrides: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Find out what would go wrong with a recipe, and what it will cost, before it runs. Trains for an iteration or two, and
    writes nothing. Exit code 1 if something is red. A recipe can run code, the Python functions that it names.

    [dim]tiltflow doctor digits-even[/dim]
    [dim]tiltflow doctor mine.yaml --set training.micro_batch_size=4 --device cuda[/dim]
    """
    from dataclasses import asdict

    from tiltflow.api import read_recipe
    from tiltflow.runs.doctor import Finding, examine, refuse, verdict
    from tiltflow.runs.recipe import find_recipe, read_recipe_tree

    console, found = _console(as_json), list[Finding]()
    colours = {"green": "green", "amber": "yellow", "red": "red bold"}

    def show(finding: Finding) -> None:
        found.append(finding)
        colour = colours[finding.level]
        level = f"[{colour}]{finding.level:6}[/{colour}]"
        console.print(f"{level} [bold]{escape(finding.check)}[/bold]  {escape(finding.text)}", soft_wrap=True)
        if finding.remedy:
            console.print(f"       [dim]{escape(finding.remedy)}[/dim]", soft_wrap=True)

    path = find_recipe(recipe, "train")
    try:
        settings = read_recipe(read_recipe_tree(path, _with_seed(overrides, seed)), recipe)
    except InputError as error:
        show(refuse(error))
    else:
        for finding in examine(settings, _device(device, threads)):
            show(finding)
    _finish(as_json, {"verdict": verdict(found), "findings": [asdict(finding) for finding in found]})
    if verdict(found) == "red":
        raise typer.Exit(1)


@app.command()
def verify_checkpoint(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, or one of its checkpoints.")],
    as_json: Json = False,
) -> None:
    """Read checkpoints again, and say whether every byte is as it was written. Exit code 1 if one is not.

    [dim]tiltflow verify-checkpoint runs/even[/dim]
    """
    from tiltflow.errors import CheckpointError
    from tiltflow.runs import checkpoint

    inside = checkpoint.checkpoints(path / checkpoint.FOLDER)
    folders = [path] if (path / checkpoint.MANIFEST).exists() else inside or checkpoint.checkpoints(path)
    if not folders:
        raise InputError(f"{path}: is no checkpoint, and has none in {checkpoint.FOLDER}/")
    console, found = _console(as_json), dict[str, str | None]()
    for folder in folders:
        try:
            checkpoint.verify_checkpoint(folder)
            found[folder.name] = None
            console.print(f"[green]good[/green] {escape(folder.name)}")
        except CheckpointError as error:
            if not folder.exists():  # the run that it belongs to has written newer ones
                console.print(f"[dim]gone[/dim] {escape(folder.name)}: deleted meanwhile")
                continue
            found[folder.name] = str(error)
            console.print(f"[red]bad[/red]  {escape(str(error))}")
    _finish(
        as_json,
        {"checkpoints": [{"name": name, "good": problem is None, "problem": problem} for name, problem in found.items()]},
    )
    if any(found.values()):
        raise typer.Exit(1)


@app.command()
def sweep(
    recipe: TrainRecipe,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new, empty, or this sweep's own.")],
    over: Annotated[list[str], typer.Option("--over", metavar="KEY=A,B,..", help="Values of a setting; several make a grid.")],
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    overrides: Set = None,
    device: Device = "auto",
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train on a grid of settings, and draw what reward costs in distance to the base.

    Each point is a run in a folder of its own. Started again, it goes on with the points that are missing. Points that differ
    in `seed` alone are shown as one, with their spread. A recipe can run code, the Python functions that it names.

    [dim]tiltflow sweep digits-even-orw --over method.alpha=0,0.3,1 --over method.tau=1,3 --output runs/sweep[/dim]
    [dim]tiltflow sweep digits-even --over method.beta=1,2,4 --over seed=0,1,2 --processes 2 --output runs/betas[/dim]
    """
    from tiltflow.runs.recipe import find_recipe, read_recipe_tree
    from tiltflow.runs.sweep import parse_grid
    from tiltflow.runs.sweep import sweep as run_sweep

    grid, console = parse_grid(over), _console(as_json)
    tree = read_recipe_tree(find_recipe(recipe, "train"), overrides or [])
    chosen, count = _device(device, None), 1
    for values in grid.values():
        count *= len(values)
    columns = (SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("runs"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("sweep", total=count)

        def watch(name: str, what: str) -> None:
            bar.advance(task)
            if not quiet:
                console.print(f"{escape(name)}: {escape(what)}")

        result = run_sweep(tree, grid, output, processes=processes, device=chosen, watch=watch)
    _show_sweep(console, result, [key for key in grid if key != "seed"])
    console.print(f"front: {escape(output / 'pareto.svg')}")
    _finish(as_json, result)
    if any("error" in row for row in result["runs"]):
        raise typer.Exit(1)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a training run.")],
    num_samples: Annotated[int | None, typer.Option(min=2, help="Samples of each model.", show_default="the recipe's")] = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a run again, from its folder alone; writes its summary, pictures and report anew.

    A recipe can run code, the Python functions that it names; code in the folder of the run is not run without --allow-code.

    [dim]tiltflow evaluate runs/even --num-samples 5000[/dim]
    """
    from tiltflow.api import evaluate as evaluate_it

    console = _console(as_json)
    chosen = _device(device, threads)
    with _spinner(console, quiet, "sampling the base and the tuned model"):
        summary = evaluate_it(folder, device=chosen, num_samples=num_samples)
    _show_summary(console, summary, folder)
    _finish(as_json, summary)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a training run of a diffusers pipeline.")],
    output: Output,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it, with the token of `hf auth login`.", show_default="no")
    ] = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
    as_json: Json = False,
) -> None:
    """Write a tuned pipeline for plain diffusers: a LoRA for `load_lora_weights`, or a whole pipeline, and its model card.

    [dim]tiltflow export runs/cats --output exported/cats[/dim]
    """
    from tiltflow.runs.export import export_run

    result = export_run(folder, output, push_to_hub=push_to_hub)
    loads = "pipeline.load_lora_weights" if result["kind"] == "lora" else "DiffusionPipeline.from_pretrained"
    uploaded = f"; uploaded to {result['url']}" if result["url"] else ""
    _console(as_json).print(escape(f'{loads}("{output}") loads it{uploaded}'))
    _finish(as_json, result)


@app.command(name="serve-reward")
def serve_reward(
    recipe: Annotated[Path, typer.Argument(help="A .yaml file with `reward:`, as in a training recipe.")],
    overrides: Set = None,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8777,
    token_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the token that requests must bring.", show_default="none")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
) -> None:
    """Serve a reward to other processes of this machine, for reward `http`. Listens on 127.0.0.1 alone; Ctrl-C ends it.

    [dim]tiltflow serve-reward pick-score.yaml --port 8777[/dim]
    [dim]tiltflow train mine.yaml --output runs/mine --set 'reward={name: http, url: "http://127.0.0.1:8777/score"}'[/dim]
    """
    import os

    from tiltflow.commands.serve_reward import HOST, Served, make_server
    from tiltflow.settings import apply_overrides, read_yaml, validate

    tree = apply_overrides(read_yaml(recipe), overrides or [])
    settings = validate(Served, {key: value for key, value in tree.items() if key == "reward"}, str(recipe))
    if token_variable is not None and token_variable not in os.environ:
        raise InputError(f"--token-variable: the environment has no {token_variable}")
    chosen = _device(device, threads)
    token = os.environ[token_variable] if token_variable else None
    server = make_server(settings.reward.build(chosen), port, token=token, device=chosen)
    _console(False).print(f"{escape(settings.reward.name)} at http://{HOST}:{server.server_address[1]}/score, Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run, a model folder, or a shipped model.", autocompletion=_completes(_models)),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png grid, or .npz with the array `samples`.")] = Path(
        "samples.png"
    ),
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", "-n", min=1, help="How many; of each prompt.", show_default="64; 4 of a prompt"),
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="For a pipeline; may be repeated.")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label", help="For a class-conditional model, a class by number or name; several in turn.", show_default="all"
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="For a pipeline; 1 is none.", show_default="the model's")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SOLVERS)}, or package.module:function.",
            show_default="the model's",
            autocompletion=_completes(lambda: SOLVERS),
        ),
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.", show_default="the model's")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples at a time; part of what they depend on.", show_default="the model's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Sample a tuned model, or one of those that ship with tiltflow.

    [dim]tiltflow sample runs/even --num-samples 100 --output even.png[/dim]
    [dim]tiltflow sample digits-flow --solver heun --num-inference-steps 10[/dim]
    [dim]tiltflow sample models/classes --label 3 --num-samples 16[/dim]
    [dim]tiltflow sample runs/colour --prompt "a red cat" --num-samples 4 --output cat.png[/dim]
    """
    import numpy as np

    from tiltflow.api import load
    from tiltflow.files import check_output, write_file
    from tiltflow.models.text_to_image import TextToImage
    from tiltflow.reports.plots import image_grid
    from tiltflow.samplers.sampler import Sampling
    from tiltflow.settings import validate

    if output.suffix not in (".png", ".npz"):
        raise InputError(f"--output {output}: must end in .png or .npz")
    loaded, console = load(model, _device(device, threads)), _console(as_json)
    changes = {"solver": solver, "num_inference_steps": num_inference_steps}
    tree = loaded.sampling.model_dump() | {key: value for key, value in changes.items() if value is not None}
    sampling = validate(Sampling, tree, "sample")
    options: dict[str, Any] = {"seed": seed, "sampling": sampling} | ({} if batch_size is None else {"batch_size": batch_size})
    told: dict[str, Any] = {}
    if isinstance(loaded, TextToImage):
        if labels is not None:
            raise InputError(f"--label: {model} is a pipeline; --prompt says what its pictures are of")
        if not prompts:
            raise InputError('--prompt: give at least one, for example --prompt "a red cat"')
        each = num_samples or 4
        several, columns = [prompt for prompt in prompts for _ in range(each)], each
        count, what = len(several), "pictures"
        told = {"prompts": prompts, "guidance_scale": loaded.guidance_scale if guidance_scale is None else guidance_scale}
        draw = partial(loaded.sample, several, guidance_scale=guidance_scale, **options)
    else:
        for option, value in (("--prompt", prompts), ("--guidance-scale", guidance_scale)):
            if value is not None:
                raise InputError(f"{option}: {model} is no text-to-image model; --num-samples says how many samples it draws")
        shape, count, what = loaded.event_shape, num_samples or 64, "samples"
        if output.suffix == ".png" and not (len(shape) == 3 and shape[0] in (1, 3)):
            raise InputError(f"--output {output}: samples of shape {list(shape)} are no pictures; use .npz")
        columns, chosen = max(1, round(count**0.5)), None
        if labels is not None:
            chosen, told = [labels[i % len(labels)] for i in range(count)], {"labels": labels}
        draw = partial(loaded.sample, count, labels=chosen, **options)
    check_output(output)
    with _spinner(console, quiet, f"sampling {count}"):
        x = draw()

    def write(draft: Path) -> None:
        with open(draft, "wb") as file:
            if output.suffix == ".png":
                image_grid(x, columns).save(file, "PNG")
            else:
                np.savez_compressed(file, samples=x.numpy())

    write_file(output, write)
    if not quiet:
        console.print(f"{count} {what} in {escape(output)}")
    _finish(as_json, {"output": str(output), "num_samples": count, "seed": seed, **told, **sampling.model_dump()})


@app.command()
def verify(
    problem: Annotated[
        str | None,
        typer.Argument(help=f"{', '.join(PROBLEMS)}; leave it out for the list.", autocompletion=_completes(lambda: PROBLEMS)),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(METHODS)}.",
            show_default="adjoint-matching; score-as-action for lqg",
            autocompletion=_completes(lambda: METHODS),
        ),
    ] = None,
    overrides: Set = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default="the problem's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default="0")] = None,
    threads: Threads = None,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a method on a problem with a known answer, and measure its distance to that answer.

    Settings are those of the problem, the method and the run, by name or dotted name.

    [dim]tiltflow verify mixture[/dim]
    [dim]tiltflow verify gaussian --set dimension=10 --set quadratic=3 --set beta=0.5[/dim]
    [dim]tiltflow verify mixture --set problem.scale=0.3 --set method.num_inference_steps=80 --iterations 1000[/dim]
    [dim]tiltflow verify mixture --method score-as-action --set sampling.solver=heun[/dim]
    [dim]tiltflow verify two-modes --method orw-cfm-w2 --set alpha=0.3[/dim]
    [dim]tiltflow verify lqg --set Q=1.3 --set q=0.7 --set lambda=0.5 --set T=2 --set K=0.2 --set k=-0.1 --set N=40[/dim]
    """
    from tiltflow.problems.verify import PROBLEMS, read_verification, run_verification

    console = _console(as_json)
    if problem is None:
        descriptions = {name: (part.__doc__ or "").splitlines()[0] for name, part in PROBLEMS.items()}
        _list(console, descriptions, "problem")
        _finish(as_json, {"problems": descriptions})
        return
    if problem not in PROBLEMS:
        raise InputError(f"there is no problem {problem!r}{did_you_mean(problem, PROBLEMS)}")
    extra = [f"{key}={value}" for key, value in (("iterations", iterations), ("seed", seed)) if value is not None]
    method = method or ("score-as-action" if problem == "lqg" else "adjoint-matching")
    settings = read_verification(problem, method, [*(overrides or []), *extra])
    _device("cpu", threads)
    with _progress(console, quiet, settings.iterations, settings.train_batch_size) as watch:
        result = run_verification(settings, watch)
    if problem == "two-modes":
        _show_two_modes(console, result)
    else:
        if problem == "lqg":
            _show_lqg(console, result)
        _show_verification(console, result)
    _finish(as_json, result)


@app.command()
def pretrain(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A pretraining recipe of `tiltflow recipes`, or a .yaml file.", autocompletion=_completes(_recipes("pretrain"))
        ),
    ],
    data: Annotated[Path, typer.Option(help="An .npz file with x_train, y_train, .. or a folder of images.")],
    output: Output,
    overrides: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a small flow, diffusion model, classifier or text-to-image pipeline from images. The shipped ones were made so.

    [dim]tiltflow pretrain digits-flow --data mnist.npz --output models/flow[/dim]
    [dim]tiltflow pretrain tiles-pipeline --data tiles.npz --output models/tiles[/dim]
    """
    from tiltflow.pretraining.pretrain import pretraining_of, run_pretraining
    from tiltflow.runs.recipe import find_recipe, read_recipe_tree

    changes = _with_seed(overrides, seed)
    chosen = _device(device, threads)
    console = _console(as_json)
    tree = read_recipe_tree(find_recipe(recipe, "pretrain"), changes)
    if tree.get("task") == "text-to-image":
        from tiltflow.pretraining.pretrain_pipeline import PipelinePretraining, run_pipeline_pretraining
        from tiltflow.settings import validate

        pipeline = validate(PipelinePretraining, tree, recipe)
        steps = pipeline.autoencoder.max_train_steps + pipeline.training.max_train_steps
        with _progress(console, quiet, steps, pipeline.training.train_batch_size) as watch:
            scores = run_pipeline_pretraining(pipeline, data, output, name=recipe, device=chosen, watch=watch)
    else:
        settings = pretraining_of(tree, recipe)
        with _progress(console, quiet, settings.training.max_train_steps, settings.training.train_batch_size) as watch:
            scores = run_pretraining(settings, data, output, name=recipe, device=chosen, watch=watch)
    if not quiet:
        _list(
            console, {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in scores.items()}, "score"
        )
        console.print(f"model in {escape(output)}")
    _finish(as_json, {"output": str(output), **scores})


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that ship with tiltflow, or print one, to copy and change.

    [dim]tiltflow recipes digits-even > mine.yaml[/dim]
    """
    from tiltflow.runs.recipe import shipped_recipes
    from tiltflow.settings import read_yaml

    files = {**shipped_recipes("train"), **shipped_recipes("pretrain")}
    if name is not None:
        if name not in files:
            raise InputError(f"there is no recipe {name!r}{did_you_mean(name, files)}")
        sys.stdout.write(files[name].read_text(encoding="utf-8"))
        return
    console = _console(as_json)
    entries = [
        {"name": key, "command": path.parent.name, "description": read_yaml(path).get("description", "")}
        for key, path in files.items()
    ]
    _list(console, {f"{entry['command']} {entry['name']}": entry["description"] for entry in entries}, "recipe")
    _finish(as_json, {"recipes": entries})


@app.command()
def settings(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A method, reward, network, problem, or part of a recipe; leave it out for the list.",
            autocompletion=_completes(_topics),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List every setting with its type, its default and what it does: of a method or a reward, or of a part of a recipe.

    [dim]tiltflow settings adjoint-matching[/dim]
    [dim]tiltflow settings class-log-odds[/dim]
    [dim]tiltflow settings training[/dim]
    """
    from dataclasses import asdict

    from tiltflow.runs.describe import settings_of, topics

    console = _console(as_json)
    if topic is None:
        listed = {name: [title for title, _ in kinds] for name, kinds in topics().items()}
        _list(console, {name: "; ".join(titles) for name, titles in listed.items()}, "settings of")
        _finish(as_json, {"topics": listed})
        return
    found = settings_of(topic)
    for title, (said, keys) in found.items():
        console.print(f"[bold]{escape(title)}[/bold]  {escape(said)}")
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("setting", "type", "default", ""):
            table.add_column(column, style="cyan" if column == "setting" else None, overflow="fold")
        for key in keys:
            table.add_row(*(escape(text) for text in (key.name, key.type, key.default, key.description)))
        console.print(table)
    _finish(
        as_json,
        {title: {"description": said, "settings": [asdict(key) for key in keys]} for title, (said, keys) in found.items()},
    )


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; errors that a user can cause, and notes, are one line."""
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    try:
        app()
    except TiltflowError as error:
        if os.environ.get("TILTFLOW_TRACEBACK"):
            traceback.print_exc()
        code = 2 if isinstance(error, InputError) else 1
        if not _speaks():
            time.sleep(3)  # what all processes find, the first one says; its end then takes this one down
        process = "" if _speaks() else f" of process {os.environ['RANK']}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"[red bold]error{process}:[/red bold] {escape(str(error))}"
        )
        if "WORLD_SIZE" in os.environ:
            os._exit(code)  # the others may be waiting for this one: to leave them in order would be to wait for them
        sys.exit(code)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def _show_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """One of tiltflow's as a line of its own."""
    if issubclass(category, Note):
        if _speaks():
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"[yellow]{escape(str(message))}[/yellow]")
    else:
        otherwise(message, category, *where)


def _with_seed(overrides: list[str] | None, seed: int | None) -> list[str]:
    return [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]


def _device(name: str, threads: int | None) -> str:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: torch has no such device here; cpu always works") from None
    return name


def _speaks() -> bool:
    """Whether this is the first of the processes that a launcher has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _console(as_json: bool) -> Console:
    return Console(stderr=as_json, highlight=False, quiet=not _speaks())


def _finish(as_json: bool, result: dict[str, Any]) -> None:
    if as_json and _speaks():
        print(json.dumps(result))


@contextmanager
def _spinner(console: Console, quiet: bool, text: str) -> Iterator[None]:
    if quiet:
        yield
        return
    with console.status(text):
        yield


@contextmanager
def _progress(console: Console, quiet: bool, total: int, batch: int) -> Iterator[Callable[[Any], None]]:
    """A progress bar that is shown training records; without a terminal, a line for each tenth of the work. Samples are those
    that were drawn; in pretraining, `batch` real ones a step."""
    from tiltflow.training.trainer import Record

    if quiet:
        yield lambda record: None
        return
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[stage]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=total, metrics="", stage="")

        def watch(record: Any) -> None:
            shown = record.metrics if hasattr(record, "metrics") else {"loss": record.loss}
            parts = [f"{key} {shown[key]:.3f}" for key in ("reward", "loss") if key in shown]
            done = record.samples_drawn if isinstance(record, Record) else record.step * batch
            text = "  ".join([*parts, f"{done / max(record.seconds, 1e-9):.0f} samples/s"])
            stage = "left" if record.step < total else "now evaluating"
            with suppress(OSError):  # of a terminal that was closed
                bar.update(task, completed=record.step, metrics=text, stage=stage)
                if not console.is_terminal and record.step % max(total // 10, 1) == 0:
                    console.print(f"{record.step}/{total}  {text}  {record.seconds:.0f} s")

        yield watch


def _list(console: Console, rows: dict[str, str], title: str) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title, no_wrap=True, style="cyan")
    table.add_column("")
    for key, text in rows.items():
        table.add_row(escape(key), escape(text))
    console.print(table)


def _show_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """The result of a run, in the order in which a person asks."""

    def pm(key: str) -> str:
        return f"{summary[key]:.3f} ± {summary[key + '_error']:.3f}"

    known = summary["target_unknown"] is None
    rows = {"reward, base": pm("reward_base"), "reward, tuned": pm("reward_tuned")}
    if known:
        rows["reward, target"] = f"{pm('reward_target')}   (importance-weighted base)"
    judge = summary["judge"]
    if judge and "group" in judge:
        group = judge["group"]
        aim = f"; the target has {group['target']:.1%} ± {group['target_error']:.1%}" if known else ""
        rows[f"judge sees {group['label']}"] = (
            f"{group['base']:.1%} before, {group['tuned']:.1%} ± {group['tuned_error']:.1%} after{aim}"
        )
    if judge:
        rows["judge is sure of"] = (
            f"{judge['sure_base']:.1%} before, {judge['sure_tuned']:.1%} after (probability above {judge['sure_above']:g})"
        )
    if judge and "frechet_base" in judge:
        rows["Frechet distance to real images"] = (
            f"{judge['frechet_base']:.1f} before, {judge['frechet_tuned']:.1f} after"
            f" (features of {escape(judge['model'])}; two halves of the real ones {judge['frechet_real']:.1f})"
        )
    if known:
        rows["distance to target"] = (
            f"{summary['target_distance']:.3f}   (base {summary['target_distance_base']:.3f};"
            f" {summary['target_distance_floor']:.3f} is left where nothing is wrong)"
        )
        rows[""] = f"[dim]{escape(summary['target_distance_kind'])}[/dim]"
    if summary["path_kl"] is not None:
        aim = f"   (KL of the target law: {pm('path_kl_target')})" if summary["path_kl_target"] is not None else ""
        rows["path KL"] = f"{pm('path_kl')} nats{aim}"
    if "own_law_balance" in summary:
        rows["pull over penalty"] = f"{pm('own_law_balance')}   (1 where the rounds settle; below it, noise was learned)"
    if summary["working_beta"] is not None:
        rows["temperature"] = (
            f"{summary['beta']:g}; calibrated on the mean reward, the run worked at {summary['working_beta']:.3g}"
        )
    rows["effective sample size"] = f"{summary['effective_sample_size']:.0f} of {summary['num_samples']}"
    if "effective_sample_size_of_group" in summary:
        rows["effective sample size"] += f", {summary['effective_sample_size_of_group']:.1f} of each prompt"
    rows["time"] = f"{summary['seconds']:.0f} s training, {summary['seconds_total']:.0f} s in all"
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, text in rows.items():
        table.add_row(f"[bold]{escape(key)}[/bold]", text)
    console.print(table)
    if summary.get("alarm"):
        console.print(f"[red bold]ALARM[/red bold] {escape(summary['alarm'])}")
    if summary.get("best_step"):
        console.print(f"best by {escape(summary['best_by'])}: step {summary['best_step']}, kept in {escape(folder / 'best')}")
    for limit in summary["limits"]:
        console.print(f"[yellow]{escape(limit)}[/yellow]")
    colour = {"good": "green", "poor": "red"}.get(summary["verdict"]["tone"], "yellow")
    console.print(f"[{colour}]{escape(summary['verdict']['text'])}[/{colour}]")
    console.print(f"report: {escape(folder / 'report.html')}")


def _show_sweep(console: Console, result: dict[str, Any], keys: list[str]) -> None:
    """A line for each point of the grid, its seeds together."""
    from tiltflow.runs.sweep import DISTANCES, short_names

    names, cost = list(short_names(keys).values()), result["distance"]
    variety = {"entropy_tuned": "entropy", "vendi_tuned": "Vendi"}
    kind = next((key for key in variety if any(key in row for row in result["points"])), "entropy_tuned")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (*names, "reward", DISTANCES[cost], variety[kind], "runs", ""):
        table.add_column(column, no_wrap=column in (*names, "runs"))
    for row in result["points"]:
        values = [escape(str(row[name])) for name in names]
        if "error" in row:
            table.add_row(*values, f"[yellow]{escape(row['error'])}[/yellow]", "", "", str(row["runs"]), "")
            continue
        differ = f"{row[kind]:.2f}" if kind in row else ""
        reward, distance = (f"{row[key]:.3f} ± {row[key + '_std']:.3f}" for key in ("reward_tuned", cost))
        table.add_row(*values, reward, distance, differ, str(row["runs"]), "front" if row["on_front"] else "")
    console.print(table)


def _show_lqg(console: Console, result: dict[str, Any]) -> None:
    """What is known exactly, the estimates of the gradient against it, and what training reached."""
    policy, best, steps = result["policy"], result["optimum"], result["policy"]["num_inference_steps"]

    def numbers(values: Any) -> str:
        return ", ".join(f"{value:.6f}" for value in values)

    _list(
        console,
        {
            "J, continuous": f"{policy['objective']:.10f}",
            "dJ/dK, dJ/dk": numbers(policy["gradient"]),
            "P, p, c at the start": numbers(policy["value"].values()),
            "terminal mean, variance": numbers([policy["terminal_mean"], policy["terminal_variance"]]),
            f"J, chain of {steps} steps": f"{policy['objective_of_chain']:.10f}",
            "dJ/dK, dJ/dk of the chain": numbers(policy["gradient_of_chain"]),
        },
        f"exact, u = {policy['K']:g} x {policy['k']:+g}",
    )
    _list(
        console,
        {
            "J, continuous": f"{result['objective_continuous']:.10f}",
            "J, chain": f"{result['objective_exact']:.10f}",
            "K, k at the start": numbers([best["K"], best["k"]]),
            "P, p, c at the start": numbers(best["value"].values()),
            "terminal mean, variance": numbers([best["terminal_mean"], best["terminal_variance"]]),
            "of the tilted law": numbers([best["tilted_mean"], best["tilted_variance"]])
            + f"   (initial-value bias {result['initial_value_bias']:.4f} in W2)",
            "path KL": f"{best['path_kl']:.6f}",
        },
        "exact, the optimum",
    )
    if result["gradients"]:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("estimator", "dJ/dK", "z", "dJ/dk", "z", "variance"):
            table.add_column(column, style="cyan" if column == "estimator" else None, no_wrap=True)
        reference = result["gradients"]["return"]["variance"]
        for name, row in result["gradients"].items():
            (a, b), (a_error, b_error), (za, zb) = row["gradient"], row["error"], row["z"]
            ratios = ", ".join(f"1 / {r / v:.1f}" for r, v in zip(reference, row["variance"], strict=True))
            table.add_row(name, f"{a:.3f} ± {a_error:.3f}", f"{za:+.1f}", f"{b:.3f} ± {b_error:.3f}", f"{zb:+.1f}", ratios)
        console.print(table)
    rows = {
        f"{n} steps": f"{at['objective']:.5f}   (optimum {at['optimum']:.5f}; short by {_lost(at):.2%})"
        for n, at in result["at_other_steps"].items()
    }
    _list(console, rows, f"J of the policy trained at {steps} steps, evaluated at")


def _show_two_modes(console: Console, result: dict[str, Any]) -> None:
    """The exact laws side by side with what training reached, and its distances to them."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (f"{result['method']} on {result['problem']}", "base", "tilted law", "own target", "reached"):
        table.add_column(column, no_wrap=True)
    laws = [result["laws"][name] for name in ("base", "tilted", "own")]
    quantities = {
        "mean": "mean",
        "variance": "variance",
        "reward": "mean reward",
        "positive": "P(x > 0)",
        "w2_to_base": "W2 to the base",
        "kl_to_base": "KL to the base",
        "penalty": "E|v - v_base|²",
    }
    for key, label in quantities.items():
        exact = [f"{abs(law[key]) if abs(law[key]) < 1e-9 else law[key]:.4f}" for law in laws]
        table.add_row(f"[cyan]{label}[/cyan]", *exact, f"{result['reached'][key]:.4f}" if key in result["reached"] else "")
    console.print(table)
    ratio = result["distance"] / result["floor"]
    rows = {
        "to its own target": f"{result['distance']:.4f}   ({ratio:.2f} x the Monte-Carlo floor)",
        "floor": f"{result['floor']:.4f} ± {result['floor_std']:.4f}",
        "to the tilted law": f"{result['distance_tilted']:.4f}   (own target to tilted law: {result['own_to_tilted']:.4f})",
        "untuned base": f"{result['distance_base']:.4f}",
        "own target": result["target_law"],
        "cost": f"{result['seconds']:.0f} s, {result['network_evaluations']} network evaluations",
    }
    _list(console, rows, "W2")


def _lost(at: dict[str, float]) -> float:
    """How far an objective is below its optimum, relative to the optimum."""
    return (at["optimum"] - at["objective"]) / abs(at["optimum"])


def _span_row(result: dict[str, Any]) -> dict[str, str]:
    where = "one dimension" if result["span"] == 1 else f"{result['span']} dimensions"
    ratio = result["distance_span"] / result["floor_span"]
    return {f"within the {where} of the tilt": f"{result['distance_span']:.4f}   ({ratio:.2f} x its floor)"}


def _best_of_chain(result: dict[str, Any]) -> str:
    best = result["chain_optimum"]
    if best is None:
        return str(result["chain_optimum_missing"])
    return f"{best['distance']:.4f}, mean reward {best['reward']:.4f}   (exact, {best['num_inference_steps']} steps)"


def _show_verification(console: Console, result: dict[str, Any]) -> None:
    ratio = result["distance"] / result["floor"]
    rows = {
        "sliced W2 to the exact target": f"{result['distance']:.4f}   ({ratio:.2f} x the Monte-Carlo floor)",
        "floor": f"{result['floor']:.4f} ± {result['floor_std']:.4f}",
        **(_span_row(result) if "span" in result and result["span"] < result["dimension"] else {}),
        **({"best that this chain can reach": _best_of_chain(result)} if "chain_optimum" in result else {}),
        "untuned base": f"{result['distance_base']:.4f}",
        **({"sampled by the ODE": f"{result['distance_ode']:.4f}"} if "distance_ode" in result else {}),
        **({"exact W2": f"{result['w2']:.4f}   (floor {result['w2_floor']:.4f})"} if "w2" in result else {}),
        "mean reward": f"{result['reward']:.4f} ± {result['reward_error']:.4f}   (exact {result['reward_exact']:.4f})",
        "relative error of the control": f"{result['control_error']:.1%}",
        **(
            {"path KL": f"{result['path_kl']:.4f}   (exact {result['path_kl_exact']:.4f})"}
            if result["path_kl"] is not None
            else {}
        ),
        "cost": f"{result['seconds']:.0f} s, {result['evaluations_per_trajectory']:.0f} evaluations per trajectory per step",
    }
    _list(console, rows, f"{result['method']} on {result['problem']}")
