"""Every command that we print can be typed: in README and docs, in --help, on model cards, in errors, and in a run's report."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import tiny_recipe
from typer.testing import CliRunner

import tiltflow
from tiltflow.commands.compare import split
from tiltflow.commands.terminal.app import app
from tiltflow.pretraining.recipe import read_pretraining
from tiltflow.problems.verification.steering import read_steered
from tiltflow.problems.verification.verify import read_verification
from tiltflow.reports.page import commands
from tiltflow.runs.comparison.budget import Budget
from tiltflow.runs.comparison.plan import Plan
from tiltflow.runs.describe import topics
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe, read_recipe_tree, shipped_recipes
from tiltflow.runs.run import run
from tiltflow.runs.sweep import parse_grid, points_of
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import dump_yaml, read_yaml, validate

ROOT = Path(__file__).parent.parent
GROUP: Any = typer.main.get_command(app)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SPECIAL = set("[]{}()*?<>&;!|")
"""What bash or zsh takes for itself where no quotes are around it."""


def in_blocks(text: str) -> Iterator[str]:
    """The commands of code blocks: from `tiltflow` to the end of the line."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for block in (text for language, text in blocks if language in ("", "sh", "bash")):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(r"(?:^|-m |exec )(tiltflow [a-z].*)", line):
                yield found[1]


def in_words(text: str) -> Iterator[str]:
    """Those between backticks, where nothing is left out: a shorter one is only spoken of."""
    for command in re.findall(r"`(tiltflow [a-z][^`]*)`", text):
        name, *words = command.split()[1:]
        needed = {option for option in ("--output", "--data") if options_of(name).get(option)}
        if words and needed <= set(words) and "RECIPE" not in words and not {"…", ".."} & set(re.findall(r"…|\.\.", command)):
            yield command


def options_of(name: str) -> dict[str, bool]:
    """Of each option of a command, whether it must be given."""
    parameters = GROUP.commands[name].params if name in GROUP.commands else []
    return {option: parameter.required for parameter in parameters for option in parameter.opts}


def in_help() -> Iterator[str]:
    for command in GROUP.commands.values():
        yield from re.findall(r"\[dim\](?:accelerate launch -m )?(tiltflow .*)\[/dim\]", command.help)


PRINTED = sorted(
    {(path.name, command) for path in PAGES for text in [path.read_text()] for command in (*in_blocks(text), *in_words(text))}
    | {("--help", command) for command in in_help()}
    | {(p.parent.name, command) for p in (ROOT / "src").rglob("README.md") for command in in_words(p.read_text())}
)


def unquoted(command: str) -> str:
    """What the shell looks at: without what is in quotes, and without a comment."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
    return re.sub(r"(^|\s)#.*", "", bare)


def stand_in(name: str, overrides: list[str]) -> tuple[Path, list[str]]:
    """The recipe, or one of ours for a reader's own file."""
    if name in shipped_recipes("train") or not name.endswith(".yaml"):
        return find_recipe(name, "train"), overrides
    of_pipeline = any(text.startswith(("prompts.", "model.")) for text in overrides)
    return find_recipe("tiles-colour" if of_pipeline else "digits-even", "train"), overrides


def check(name: str, given: dict[str, Any]) -> None:
    """The settings of a command, as it would read them."""
    overrides = given.get("overrides") or []
    match name:
        case "train" | "doctor" | "advise":
            path, overrides = stand_in(given["recipe"], overrides)
            read_recipe(read_recipe_tree(path, overrides), str(path))
        case "sweep":
            tree = read_recipe_tree(find_recipe(given["recipe"], "train"), overrides)
            assert points_of(tree, parse_grid(given["over"] or [], given["seeds"]), "sweep")
        case "compare":
            budget = Budget.of(given["network_evaluations"], given["reward_evaluations"], given["seconds"])
            names = [split(given[key]) for key in ("methods", "problems", "recipes")]
            assert Plan.of(*names, seeds=given["seeds"], budget=budget, settings=overrides).subjects
        case "verify":
            named = [] if given["utility"] is None else [f"utility.name={given['utility']}"]
            if given["steer"] is not None:
                read_steered(given["problem"], given["steer"], overrides)
                return
            read_verification(given["problem"], given["method"], [*named, *overrides])
        case "pretrain":
            assert read_pretraining(given["recipe"], overrides)
        case "sample":
            validate(Sampling, {key: value for key in ("solver", "num_inference_steps") if (value := given[key])}, "sample")
        case "settings":
            assert given["topic"] in topics()
        case "recipes":
            assert given["name"] is None or given["name"] in {**shipped_recipes("train"), **shipped_recipes("pretrain")}


def test_there_are_commands_to_check() -> None:
    assert {where for where, _ in PRINTED} >= {"README.md", "--help", "digits-flow", "text-to-image.md", "reliability.md"}
    assert {command.split()[1] for _, command in PRINTED} == set(GROUP.commands)


@pytest.mark.parametrize(("where", "command"), PRINTED)
def test_a_printed_command_can_be_typed(where: str, command: str) -> None:
    if command.count("'") % 2:  # it ends the quotes of what runs it
        command = command.rstrip("'")
    command = command.partition(" > ")[0]
    assert not SPECIAL & set(unquoted(command)), "must be quoted: zsh takes [1] for a pattern"
    _, name, *words = shlex.split(command, comments=True)
    assert name in GROUP.commands
    given = GROUP.commands[name].make_context(name, words).params
    check(name, given)


def test_errors_and_docstrings_speak_of_commands_and_options_that_exist() -> None:
    """`tiltflow NAME --option`, wherever it stands between backticks."""
    for path in [*(ROOT / "src").rglob("*.py"), *PAGES]:
        for name, rest in re.findall(r"`tiltflow ([a-z][a-z-]*)([^`]*)`", path.read_text()):
            assert name in GROUP.commands, (path.name, name)
            assert {word for word in rest.split() if word.startswith("--")} <= set(options_of(name)), (path.name, name, rest)


def test_scripts_and_targets_that_are_spoken_of_exist() -> None:
    """With the options that are named: in README, docs, and the scripts' own heads."""
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    texts = [path.read_text() for path in [*PAGES, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")]]
    scripts = {found for text in texts for found in re.findall(r"python ((?:benchmarks|scripts)/\w+\.py)([^`\n#(]*)", text)}
    assert len(scripts) > 10
    for script, rest in scripts:
        known = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z-]+", rest):
            assert f'"{option}"' in known, (script, option)
    for name in {name for text in texts for name in re.findall(r"`make ([a-z-]+)[^`]*`", text)}:
        assert name in targets, name


def test_the_tests_that_pages_name_exist() -> None:
    """`test_this.py`, `test_this.py::test_that`, `::test_that` and `test_that`."""
    tests = {path.name: set(re.findall(r"def (test_\w+)", path.read_text())) for path in (ROOT / "tests").glob("test_*.py")}
    everywhere = set().union(*tests.values())
    named = set()
    for page in PAGES:
        for word in re.findall(r"`([^`\n]+)`", page.read_text()):
            if found := re.fullmatch(r"(?:tests/)?(test_\w+\.py)?(?:::)?(test_\w+)?", word):
                file, test = found.groups()
                named.add(word)
                assert file is None or file in tests, (page.name, word)
                assert test is None or test in (everywhere if file is None else tests[file]), (page.name, word)
    assert len(named) > 100


def commands_of(folder: Path) -> dict[str, str]:
    """What a report says can be done with its run."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    listed = re.search(r'<dl class="commands">(.*?)</dl>', page, re.DOTALL)
    assert listed is not None
    pairs = re.findall(r"<dt>(.*?)</dt><dd><code>(.*?)</code></dd>", listed[1])
    return {what: html.unescape(command) for what, command in pairs}


def all_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Runs what the report says, from the folder that holds the run's."""
    monkeypatch.chdir(folder.parent)
    found = commands_of(folder)
    python = found.pop("in Python")
    for what, command in found.items():
        _, *words = shlex.split(command)
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (what, command, done.output)
    names: dict[str, Any] = {"tiltflow": tiltflow}
    exec(python, names)
    assert names["model"].sample
    return {path.name for path in folder.parent.iterdir()}


def test_what_the_report_of_an_image_model_says_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder is called, quotes and markup too; that of a model that ships would be the model, without `./`."""
    assert commands({}, "digits-flow")["new samples"].startswith("tiltflow sample ./digits-flow ")
    name = "it's [1]"
    recipe = tiny_recipe(tmp_path, training={"max_train_steps": 1, "train_batch_size": 4})
    run(validate(Recipe, read_yaml(recipe), "recipe"), tmp_path / name)
    there = all_work(tmp_path / name, monkeypatch)
    assert {f"{name}-samples.png", f"{name}-again"} <= there
    again = read_yaml(tmp_path / f"{name}-again" / "recipe.yaml")
    assert again == read_yaml(tmp_path / name / "recipe.yaml")


def test_what_the_report_of_a_pipeline_says_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from tiny_pipelines import tiny_pipeline

    tiny_pipeline("stable-diffusion", tmp_path).save_pretrained(tmp_path / "pipeline")
    tree = {
        "model": {"diffusers": str(tmp_path / "pipeline"), "height": 16, "width": 16, "adapter": {"rank": 2}},
        "prompts": {"texts": ["a red cat's hat", "a blue & a black dog", "green rain"], "validation": 0.34},
        "reward": "named-colour",
        "method": {"name": "adjoint-matching", "num_inference_steps": 2},
        "training": {"max_train_steps": 1, "prompts_per_step": 1, "num_generations": 2},
        "evaluation": {"num_prompts": 1, "num_generations": 2, "points": [{"num_inference_steps": 1}]},
    }
    (tmp_path / "mine.yaml").write_text(dump_yaml(tree))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    there = all_work(tmp_path / "run", monkeypatch)
    assert {"run-samples.png", "run-again", "run-exported"} <= there
