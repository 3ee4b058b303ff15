"""`tiltflow advise`: which method, temperature and settings suit a recipe."""

from __future__ import annotations

import shlex

from tiltflow.commands.terminal.console import escape, make_console, print_json
from tiltflow.commands.terminal.options import AllowCode, Device, Json, Set, Threads, TrainRecipe, set_up_torch


def advise(
    recipe: TrainRecipe,
    overrides: Set = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Say which method, temperature and settings suit the model and the reward of a recipe, with the reason for each and the
    page that shows it. Draws a few samples of the base, and trains nothing. A recipe can run code: the Python functions that it
    names.

    [dim]tiltflow advise digits-even[/dim]
    [dim]tiltflow advise mine.yaml --set method.beta=0.1[/dim]
    """
    from dataclasses import asdict

    from tiltflow.runs.advice.facts import facts_of
    from tiltflow.runs.advice.rules import advise as by_rules
    from tiltflow.runs.recipe import find_recipe, read_one_run, read_recipe_tree

    console = make_console(as_json)
    settings = read_one_run(read_recipe_tree(find_recipe(recipe, "train"), overrides or []), recipe)
    facts = facts_of(settings, set_up_torch(device, threads))
    found = list(by_rules(facts))
    for each in found:
        console.print(f"[bold]{escape(each.about)}[/bold]  {escape(each.choice)}", soft_wrap=True)
        console.print(f"       {escape(each.why)} [dim]{escape(each.page)}[/dim]", soft_wrap=True)
    sets = [*(overrides or []), *(text for each in found for text in each.overrides)]
    line = " ".join(["tiltflow train", shlex.quote(recipe), *(f"--set {shlex.quote(text)}" for text in sets)])
    console.print(f"[dim]{escape(line)} --output runs/advised[/dim]", soft_wrap=True)
    print_json(as_json, {"facts": asdict(facts), "advice": [asdict(each) for each in found]})
