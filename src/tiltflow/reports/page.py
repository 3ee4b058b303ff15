"""Values of the report of a run, computed from its summary, training records, looks of the monitor and pictures.

The text around them is in `web/run.html.j2`; a value that a run did not measure is empty here, and left out there.
"""

# Mutation tests: none: words and pages

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tiltflow.formatting import Tree, decimal, get, number, percent
from tiltflow.reports import plots
from tiltflow.reports.description import describe
from tiltflow.reports.episodes import Task, table_of
from tiltflow.reports.molecules import Shape, pairs_of
from tiltflow.reports.tables import Row, Table, classes, measures, table, tests
from tiltflow.reports.values import capital, group, measured, sentence
from tiltflow.reports.videos import gif_rows

SIDES = ("before", "after")


@dataclass(frozen=True)
class Tile:
    """A number in large print; `before` is its value before tuning."""

    title: str
    value: str
    note: str = ""
    before: str = ""


@dataclass(frozen=True)
class Strip:
    """A row of samples as a PNG or GIF in base64; `side` is "before" or "after" tuning."""

    side: str
    data: str
    width: int
    height: int
    kind: str = "png"


@dataclass(frozen=True)
class Both:
    """The same sample before and after tuning, or a row of them: one picture, or the source of what is edited, has one strip;
    with the rewards of both, as text."""

    strips: Sequence[Strip]
    what: str
    rewards: Sequence[str] = ()
    rise: float | None = None


@dataclass(frozen=True)
class Pair:
    """A row of samples before and after tuning: pictures, or frames of a video, which is then in `moving` too.

    Args:
        prompt: what all of the row are asked for; empty without prompts.
        what: the row, in words.
        cells: its samples; the whole row as one, if it is not known where a sample ends.
    """

    prompt: str
    what: str
    cells: Sequence[Both]
    moving: Sequence[Strip] = ()


@dataclass(frozen=True)
class Mark:
    """A mark on the scale of distances, `place` in percent of its length."""

    kind: str
    label: str
    place: float


@dataclass(frozen=True)
class Card:
    """A place for curves: the name of what is drawn there, its title and texts, and its last value."""

    name: str
    title: str
    last: str
    meaning: str = ""
    expect: str = ""


@dataclass(frozen=True)
class Judged:
    """Results of the judge: histogram (SVG), its numbers, and the confidence before and after."""

    svg: str
    classes: Table
    base: str
    tuned: str
    fell: bool


@dataclass(frozen=True)
class Composed:
    """Compositions of molecules: histogram (SVG) of the commonest formulas, their shares, and how many formulas there are."""

    svg: str
    shares: Table
    number: int


@dataclass(frozen=True)
class Page:
    """Values of a report, section by section."""

    summary: Tree
    title: str
    facts: Sequence[str]
    headline: str
    description: str
    alarm: str
    tiles: Sequence[Tile]
    pairs: Sequence[Pair]
    molecules: Sequence[tuple[Shape, Shape]]
    edits: bool
    tasks: Sequence[Task]
    """What a policy was played on."""
    episodes: Table | None
    tone: str
    verdict: str
    scale: Sequence[Mark]
    tilt: str
    balance: str
    limits: Sequence[str]
    tests: Table | None
    judged: Judged | None
    composed: Composed | None
    others_relaxed: Table | None
    drawn: Mapping[str, Any]
    """What `describe` says of the run."""
    curves: Sequence[Card]
    looks: Sequence[Card]
    table: Table | None
    measures: Mapping[str, Sequence[Row]]
    commands: Mapping[str, str]
    recipe: str

    def value(self, key: str) -> str:
        """Format the number at a dotted key of the summary; empty if it was not measured."""
        return measured(self.summary, key)

    def said(self, key: str) -> str:
        """Return the text at a key of the summary; empty if there is none."""
        return str(self.summary.get(key) or "")


def page_of(
    s: Tree,
    records: Sequence[Tree],
    *,
    looks: Sequence[Tree],
    pictures: Sequence[bytes],
    videos: Sequence[bytes] = (),
    molecules: Sequence[str] = (),
    tasks: Sequence[Task] = (),
    recipe: str,
    folder: str,
) -> Page:
    """Compute the values of a report.

    Args:
        s: summary of the run.
        records: lines of metrics.jsonl.
        looks: lines of monitor.jsonl.
        pictures: PNG files before and after tuning, or none.
        videos: GIF files of the same rows, or none.
        molecules: .xyz files before and after tuning, or none; they are shown in place of pictures.
        tasks: what a policy was played on.
        recipe: text of the recipe.
        folder: name of the run's folder.
    """
    name = str(s.get("name") or folder)
    drawn = describe(s, records, looks, name=name)
    tone, verdict = get(s, "verdict.tone"), get(s, "verdict.text")
    limits = s.get("limits")
    return Page(
        summary=s,
        title=name,
        facts=[name, *(str(s[key]) for key in ("model", "method") if s.get(key))],
        headline=headline(s),
        description=sentence(s["description"]) if s.get("description") else "",
        alarm=sentence(s["alarm"]) if s.get("alarm") else "",
        tiles=[*(of_task(task) for task in tasks if task.success), *tiles(s)],
        pairs=[] if len(molecules) == 2 else pairs(s, pictures, videos),
        molecules=pairs_of(*molecules) if len(molecules) == 2 else [],
        edits=bool(get(s, "pictures.images")),
        tasks=tasks,
        episodes=table_of(tasks),
        tone=tone if tone in ("good", "fair", "poor") else "fair",
        verdict=verdict if isinstance(verdict, str) else "",
        scale=scale(s),
        tilt=tilt(s),
        balance=balance(s),
        limits=[str(limit) for limit in limits] if isinstance(limits, list) else [],
        tests=tests(s),
        judged=judged(s),
        composed=composed(s),
        others_relaxed=others_relaxed(s),
        drawn=drawn,
        curves=curves(drawn),
        looks=looks_of(drawn),
        table=table(s),
        measures=measures(s),
        commands=commands(s, folder) | played_again(tasks, folder) | {"in Python": f"model = tiltflow.load({f'./{folder}'!r})"},
        recipe=recipe,
    )


@dataclass(frozen=True)
class Change:
    """A number before and after tuning, and under the target law."""

    subject: str
    base: float | None
    tuned: float
    target: float | None
    target_error: float | None
    form: Callable[..., str]


def changes(s: Tree) -> list[Change]:
    """Return the changes of the share of the judge's group and of the mean reward, as far as measured."""
    found = []
    for stem, subject, form in (("judge.group.", group(s), percent), ("reward_", "the mean reward", decimal)):
        tuned = number(s, f"{stem}tuned")
        if tuned is not None:
            target, error = (number(s, stem + key) for key in ("target", "target_error"))
            found.append(Change(subject, number(s, f"{stem}base"), tuned, target, error, form))
    return found


def headline(s: Tree) -> str:
    """Describe the run in one sentence, by the judge's group if there is one, else by the mean reward."""
    known = changes(s)
    if not known:
        return f"A run of {s.get('method') or 'tiltflow'}"
    c = known[0]
    before, after = None if c.base is None else c.form(c.base), c.form(c.tuned)
    change = f"is {after}" if before is None else f"stayed at {after}" if before == after else f"went from {before} to {after}"
    return sentence(
        f"{c.subject} {change}" + (f"; under the target law it is {c.form(c.target)}" if c.target is not None else "")
    )


def tiles(s: Tree) -> list[Tile]:
    """Return the tiles of the most important numbers."""
    found = []
    for c in changes(s):
        aim = f"target {c.form(c.target, c.target_error)}" if c.target is not None else ""
        found.append(tile(c.subject, c.base, c.tuned, c.form, aim))
    if (distance := number(s, "target_distance")) is not None:
        floor = measured(s, "target_distance_floor")
        base, note = number(s, "target_distance_base"), f"floor {floor}" if floor else ""
        found.append(tile("distance to the target law", base, distance, decimal, note))
    if tilted := measured(s, "achieved_tilt"):
        value, _, error = tilted.partition(" ± ")  # both in the size of a tile's number are wider than one on a phone
        r2 = measured(s, "achieved_tilt_r2")
        notes = [f"± {error}" if error else "", "1 is the target law", f"R² {r2}" if r2 else ""]
        found.append(Tile("Achieved tilt", value, "; ".join(note for note in notes if note)))
    samples, target, steps = (measured(s, key) for key in ("num_samples", "path_kl_target", "iterations"))
    if size := measured(s, "effective_sample_size"):
        found.append(Tile("Effective sample size", size, f"of {samples} base samples" if samples else ""))
    if (paths := number(s, "path_kl")) is not None:
        found.append(
            Tile("Path KL from the base", decimal(paths), (f"target {target}, " if target else "") + "nats per sample")
        )
    if time := measured(s, "seconds"):
        found.append(Tile("Training time", time, f"{steps} iteration{'' if get(s, 'iterations') == 1 else 's'}"))
    return found


def of_task(task: Task) -> Tile:
    """Return the tile of the success rate in a task."""
    *before, after, interval = task.success
    return Tile(f"Success: {task.title}", after, f"95 %: {interval}", "".join(before))


def tile(subject: str, base: float | None, tuned: float, form: Callable[..., str], note: str) -> Tile:
    """Return the tile of a change, without the value before if both are formatted alike."""
    before = "" if base is None or form(base) == form(tuned) else form(base)
    return Tile(capital(subject), form(tuned), note, before)


def pairs(s: Tree, pictures: Sequence[bytes], videos: Sequence[bytes] = ()) -> list[Pair]:
    """Pair each row of samples before tuning with the same row after it."""
    if len(pictures) != 2:
        return []
    opened = [Image.open(io.BytesIO(data)) for data in pictures]
    rows, prompts = get(s, "pictures.rows"), get(s, "pictures.prompts") or []
    count = rows if isinstance(rows, int) and 0 < rows <= min(picture.height for picture in opened) else 1
    moving = [gif_rows(data, count) for data in videos] if len(videos) == 2 else [[], []]
    found = []
    for i, both in enumerate(zip(*(plots.grid_rows(picture, count) for picture in opened), strict=True)):
        prompt = str(prompts[i]) if i < len(prompts) else ""
        what = prompt or f"Row {i + 1} of the samples"
        movies = [gif(side, rows[i]) for side, rows in zip(SIDES, moving, strict=True) if rows]
        found.append(Pair(prompt, what, cells(s, i, what, both), movies))
    return found


def cells(s: Tree, place: int, what: str, both: Sequence[Image.Image]) -> list[Both]:
    """Cut a row, before and after tuning, into its samples, each with its rewards."""
    columns, edits = number(s, "pictures.columns"), bool(get(s, "pictures.images"))
    count = int(columns or 1) + (edits and columns is not None)
    cut = [plots.row_cells(strip, count) for strip in both]
    if count == 1:
        return [both_of(s, place, what, cut, 0)]
    source = [Both([strip("before", cut[0][0])], f"{what}: the picture that is edited")] if edits else []
    return source + [both_of(s, place * (count - edits) + i, what, cut, i + edits) for i in range(count - edits)]


def both_of(s: Tree, place: int, what: str, cut: Sequence[Sequence[Image.Image]], column: int) -> Both:
    """A sample before and after tuning, the one at this place of all."""
    lists = [get(s, f"pictures.rewards.{side}") for side in SIDES]
    known = [each[place] if isinstance(each, list) and place < len(each) else None for each in lists]
    before, after = (value if isinstance(value, int | float) else None for value in known)
    return Both(
        [strip(side, row[column]) for side, row in zip(SIDES, cut, strict=True)],
        what,
        [] if before is after is None else ["–" if value is None else decimal(value) for value in (before, after)],
        None if before is None or after is None else after - before,
    )


def strip(side: str, picture: Image.Image) -> Strip:
    """Encode a picture in base64."""
    return Strip(side, png(picture), picture.width, picture.height)


def gif(side: str, data: bytes) -> Strip:
    """Encode a GIF file in base64."""
    width, height = Image.open(io.BytesIO(data)).size
    return Strip(side, base64.b64encode(data).decode(), width, height, "gif")


def png(picture: Image.Image) -> str:
    """Encode a picture as a PNG file in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def scale(s: Tree) -> list[Mark]:
    """Return the marks of the distances to the target law: of the base, the floor and the tuned model."""
    tuned, base, floor = (number(s, f"target_distance{x}") for x in ("", "_base", "_floor"))
    if tuned is None or not base:
        return []
    longest = 1.04 * max(tuned, base, floor or 0.0)
    crowded = floor is not None and abs(base - floor) < longest / 2  # both have their labels below the line
    return [
        Mark(f"{name}{' left' * (value > longest / 2)}{' low' * crowded}", f"{name} {decimal(value)}", 100 * value / longest)
        for name, value in (("base", base), ("floor", floor), ("tuned", tuned))
        if value is not None
    ]


def tilt(s: Tree) -> str:
    """Interpret the achieved tilt and its R²; empty if it was not measured."""
    value, error = number(s, "achieved_tilt"), number(s, "achieved_tilt_error") or 0.0
    if value is None:
        return ""
    r2, of_r2, beta = number(s, "achieved_tilt_r2"), number(s, "achieved_tilt_r2_error") or 0.0, number(s, "beta")
    if abs(value - 1) <= 2 * error:
        said = "within two standard errors of the tilt of the target law"
    else:
        said = f"it is tilted {'less' if value < 1 else 'more'} than the target law"
        said += (
            f", as at a temperature of {decimal(beta / value)} for {beta:g}" if beta is not None and value > 2 * error else ""
        )
    if r2 is not None and r2 + 2 * of_r2 < 1:
        said += f"; {percent(1 - r2)} of the variance of how its log density has changed is no tilt by the reward"
    return said + "."


def balance(s: Tree) -> str:
    """Interpret the balance of the reward's pull and the penalty; empty if it was not measured."""
    value, error = number(s, "own_law_balance"), number(s, "own_law_balance_error") or 0.0
    if value is None:
        return ""
    if value < 1 - 2 * error:
        return (
            "it has moved further than the reward pulls it, so it has also learned noise, of the fit or of rounds with few"
            " samples"
        )
    return "it has converged, within two standard errors" if value < 1 + 2 * error else "it has not converged yet"


def judged(s: Tree) -> Judged | None:
    """Return the results of the judge, if there are any."""
    base, tuned, target, names, error = (
        get(s, f"judge.{key}") or [] for key in ("base", "tuned", "target", "class_names", "target_error")
    )
    if not names or not len(base) == len(tuned) == len(names) or len(target) not in (0, len(names)):
        return None
    errors = error if len(error) == len(names) else None
    names = [str(name) for name in names]
    before, after = number(s, "judge.confidence_base"), number(s, "judge.confidence_tuned")
    return Judged(
        plots.class_histogram(base, tuned, target, errors, names),
        classes(names, base, tuned, target, errors, number(s, "num_samples")),
        "" if before is None else percent(before),
        "" if after is None else percent(after),
        before is not None and after is not None and after < before - 0.05,
    )


def composed(s: Tree) -> Composed | None:
    """Return the compositions of molecules, if there are several."""
    names, base, tuned, target, error = (
        get(s, f"molecules.compositions.{key}") or [] for key in ("formulas", "base", "tuned", "target", "target_error")
    )
    if len(names) < 2 or not len(base) == len(tuned) == len(names) or len(target) not in (0, len(names)):
        return None
    errors = error if len(error) == len(names) else None
    return Composed(
        plots.class_histogram(base, tuned, target, errors, names),
        classes(names, base, tuned, target, errors, number(s, "num_samples"), "Formula"),
        int(number(s, "molecules.compositions.number") or 0),
    )


def others_relaxed(s: Tree) -> Table | None:
    """Return the other rewards of molecules that a force field relaxed, if there are any."""
    base, tuned = (get(s, f"molecules.others_relaxed_{side}") or {} for side in ("base", "tuned"))
    rows = [[name, *(decimal(*each[name]) for each in (base, tuned))] for name in base if name in tuned]
    return Table(("Reward", "Base", "Tuned"), rows) if rows else None


def curves(drawn: Mapping[str, Any]) -> list[Card]:
    """Return a place for each curve of training."""
    return [
        Card(key, each["title"], last(each["values"]), each["meaning"], each["expect"]) for key, each in drawn["curves"].items()
    ]


def looks_of(drawn: Mapping[str, Any]) -> list[Card]:
    """Return a place for each measure of the monitor, if there are looks after that at the base."""
    looks = drawn["looks"]
    if len(looks["steps"]) < 2:
        return []
    return [Card(name, each["title"], last(each["values"])) for name, each in looks["measures"].items()]


def last(values: Sequence[float | None]) -> str:
    """Format the last known value."""
    return next((decimal(value) for value in reversed(values) if value is not None), "–")


def commands(s: Tree, folder: str) -> dict[str, str]:
    """Return commands for a run, by purpose, to be typed in the parent of its folder."""
    run, prompts, images = f"./{folder}", get(s, "pictures.prompts"), get(s, "pictures.images")
    suffix = "gif" if get(s, "pictures.frames") else "png"
    prompt = ["--prompt", str(prompts[0])] if prompts else []
    prompt += ["--image", str(images[0]) if str(images[0]).startswith("/") else "picture.png"] if images else []
    typed = {
        "new samples": ["sample", run, *prompt, "--output", f"{run}-samples.{suffix}"],
        "measure it again": ["evaluate", run],
        "train it again": ["train", f"{run}/recipe.yaml", "--output", f"{run}-again"],
    }
    if prompts:
        typed["for plain diffusers"] = ["export", run, "--output", f"{run}-exported"]
    return {what: shlex.join(["tiltflow", *words]) for what, words in typed.items()}


def played_again(tasks: Sequence[Task], folder: str) -> dict[str, str]:
    """Return commands that play episodes of a policy again."""
    known = [task for task in tasks if task.words]
    return {f"play {task.title}": shlex.join(["tiltflow", "evaluate-policy", f"./{folder}", *task.words]) for task in known}
