"""Printing of the summary of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from tiltflow.commands.terminal.console import escape


def print_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """Print the summary of a run, the most important numbers first."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for key, text in {**rewards(summary), **judged(summary), **distances(summary), **costs(summary)}.items():
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


def print_stage(console: Console, stage: Any, count: int) -> None:
    """Print a stage that is finished in one line."""
    moved = "" if stage.rise is None else f": utility {stage.before} -> {stage.after}"
    console.print(f"stage {stage.number} of {count}{moved}")


def print_stages(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """Print the summary of stages: a row for each, and then the whole."""
    from rich.table import Table

    from tiltflow.reports.stages import HEADS, cells

    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in HEADS:
        table.add_column(head, no_wrap=head == "stage")
    for row in summary["stages"]:
        table.add_row(str(row["stage"]), *cells(row))
    console.print(table)
    whole = Table(box=None, show_header=False, pad_edge=False)
    for key, text in of_stages(summary).items():
        whole.add_row(f"[bold]{escape(key)}[/bold]", text)
    console.print(whole)
    for sentence in (*([summary["stopped"]] if summary["stopped"] else ()), *summary["caveats"]):
        console.print(f"[yellow]{escape(sentence)}[/yellow]")
    console.print(f"report: {escape(folder / 'report.html')}")


def of_stages(summary: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the utility, the distance to the first model, and the time."""
    sides = {"before": "first model", "after": "last model"}
    rows = {
        f"utility, {side}": with_error(summary, f"utility_{key}")
        for key, side in sides.items()
        if summary[f"utility_{key}"] is not None
    }
    if summary["path_kl"] is not None:
        rows["path KL"] = f"{with_error(summary, 'path_kl')} nats from the first model"
    return {**rows, "time": f"{summary['seconds']:.0f} s training, {summary['seconds_total']:.0f} s in all"}


def with_error(summary: dict[str, Any], key: str) -> str:
    """Format an estimate and its standard error."""
    return f"{summary[key]:.3f} ± {summary[key + '_error']:.3f}"


def target_is_known(summary: dict[str, Any]) -> bool:
    """Return whether the target law is known."""
    return summary["target_unknown"] is None


def rewards(summary: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the mean rewards."""
    rows = {"reward, base": with_error(summary, "reward_base"), "reward, tuned": with_error(summary, "reward_tuned")}
    if target_is_known(summary):
        rows["reward, target"] = f"{with_error(summary, 'reward_target')}   (importance-weighted base)"
    return rows


def judged(summary: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the judge, if there is one."""
    rows, judge = dict[str, str](), summary["judge"]
    if judge and "group" in judge:
        group = judge["group"]
        aim = f"; target {group['target']:.1%} ± {group['target_error']:.1%}" if target_is_known(summary) else ""
        rows[f"judge sees {group['label']}"] = (
            f"{group['base']:.1%} before, {group['tuned']:.1%} ± {group['tuned_error']:.1%} after{aim}"
        )
    if judge:
        rows["judge is sure of"] = (
            f"{judge['sure_base']:.1%} before, {judge['sure_tuned']:.1%} after (probability above {judge['sure_above']:g})"
        )
    if judge and "frechet_base" in judge:
        rows["Fréchet distance to real images"] = (
            f"{judge['frechet_base']:.1f} before, {judge['frechet_tuned']:.1f} after"
            f" (features of {escape(judge['model'])}; between two halves of these {judge['frechet_real']:.1f})"
        )
    return rows


def distances(summary: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the distances of the tuned model to its target law and to the base."""
    rows = dict[str, str]()
    if target_is_known(summary):
        rows["distance to target"] = (
            f"{summary['target_distance']:.3f}   (base {summary['target_distance_base']:.3f};"
            f" floor {summary['target_distance_floor']:.3f})"
        )
        rows[""] = f"[dim]{escape(summary['target_distance_kind'])}[/dim]"
    if summary["path_kl"] is not None:
        target = summary["path_kl_target"]
        aim = f"   (KL of the target law: {with_error(summary, 'path_kl_target')})" if target is not None else ""
        rows["path KL"] = f"{with_error(summary, 'path_kl')} nats{aim}"
    if summary["achieved_tilt"] is not None:
        r2 = f"; R² {with_error(summary, 'achieved_tilt_r2')}" if summary["achieved_tilt_r2"] is not None else ""
        rows["achieved tilt"] = f"{with_error(summary, 'achieved_tilt')} of the tilt that was asked for{r2}"
        if summary["achieved_tilt_path"] is not None:
            rows["achieved tilt"] += f"; of the memoryless paths {with_error(summary, 'achieved_tilt_path')}"
    if "own_law_balance" in summary:
        balance = with_error(summary, "own_law_balance")
        rows["pull over penalty"] = f"{balance}   (1 at the limit of the rounds; below 1, noise was learned)"
    if summary["target_kl"] is not None:
        reached = f"; KL reached {with_error(summary, 'kl_reached')}" if summary["kl_reached"] is not None else ""
        rows["temperature"] = f"{summary['beta']:.3g}, by a KL budget of {summary['target_kl']:g} nats{reached}"
    elif summary["working_beta"] is not None:
        rows["temperature"] = f"{summary['beta']:g}; the calibrated temperature ended at {summary['working_beta']:.3g}"
    return rows


def costs(summary: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the effective sample size and the time."""
    rows = {"effective sample size": f"{summary['effective_sample_size']:.0f} of {summary['num_samples']}"}
    if "effective_sample_size_of_group" in summary:
        rows["effective sample size"] += f", {summary['effective_sample_size_of_group']:.1f} of each prompt"
    rows["time"] = f"{summary['seconds']:.0f} s training, {summary['seconds_total']:.0f} s in all"
    return rows
