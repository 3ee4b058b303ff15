"""How the result of `tiltflow verify` is printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console

from tiltflow.commands.terminal.console import print_table


def print_verification(console: Console, result: dict[str, Any]) -> None:
    """Print what a method reached on a problem."""
    if result["problem"] == "two-modes":
        print_two_modes(console, result)
        return
    if result["problem"] == "lqg":
        print_lqg(console, result)
    print_reached(console, result)


def print_lqg(console: Console, result: dict[str, Any]) -> None:
    """Print what is known exactly, the estimates of the gradient beside it, and the policy at other numbers of steps."""
    print_policy(console, result["policy"])
    print_optimum(console, result)
    if result["gradients"]:
        print_gradients(console, result["gradients"])
    rows = {
        f"{n} steps": f"{at['objective']:.5f}   (optimum {at['optimum']:.5f}; short by {shortfall(at):.2%})"
        for n, at in result["at_other_steps"].items()
    }
    print_table(console, rows, f"J of the policy trained at {result['policy']['num_inference_steps']} steps, evaluated at")


def print_policy(console: Console, policy: dict[str, Any]) -> None:
    """Print what is known exactly of the policy of the problem's settings."""
    print_table(
        console,
        {
            "J, continuous": f"{policy['objective']:.10f}",
            "dJ/dK, dJ/dk": numbers(policy["gradient"]),
            "P, p, c at the start": numbers(policy["value"].values()),
            "terminal mean, variance": numbers([policy["terminal_mean"], policy["terminal_variance"]]),
            f"J, chain of {policy['num_inference_steps']} steps": f"{policy['objective_of_chain']:.10f}",
            "dJ/dK, dJ/dk of the chain": numbers(policy["gradient_of_chain"]),
        },
        f"exact, u = {policy['K']:g} x {policy['k']:+g}",
    )


def print_optimum(console: Console, result: dict[str, Any]) -> None:
    """Print what is known exactly of the optimal policy."""
    best = result["optimum"]
    print_table(
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


def print_gradients(console: Console, gradients: dict[str, Any]) -> None:
    """Print the estimates of the gradient, how many standard errors each is off, and its variance beside the plain one's."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("estimator", "dJ/dK", "z", "dJ/dk", "z", "variance"):
        table.add_column(column, style="cyan" if column == "estimator" else None, no_wrap=True)
    reference = gradients["return"]["variance"]
    for name, row in gradients.items():
        (a, b), (a_error, b_error), (za, zb) = row["gradient"], row["error"], row["z"]
        ratios = ", ".join(f"1 / {r / v:.1f}" for r, v in zip(reference, row["variance"], strict=True))
        table.add_row(name, f"{a:.3f} ± {a_error:.3f}", f"{za:+.1f}", f"{b:.3f} ± {b_error:.3f}", f"{zb:+.1f}", ratios)
    console.print(table)


def numbers(values: Iterable[float]) -> str:
    """Numbers in a row, to six decimals."""
    return ", ".join(f"{value:.6f}" for value in values)


def shortfall(at: dict[str, float]) -> float:
    """How far an objective is below its optimum, relative to the optimum."""
    return (at["optimum"] - at["objective"]) / abs(at["optimum"])


def print_two_modes(console: Console, result: dict[str, Any]) -> None:
    """Print the exact laws side by side with what training reached, and its distances to them."""
    from rich.table import Table

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
    print_table(console, rows, "W2")


def print_reached(console: Console, result: dict[str, Any]) -> None:
    """Print the distance to the exact target, and what else can be compared with exact values."""
    ratio = result["distance"] / result["floor"]
    rows = {
        "sliced W2 to the exact target": f"{result['distance']:.4f}   ({ratio:.2f} x the Monte-Carlo floor)",
        "floor": f"{result['floor']:.4f} ± {result['floor_std']:.4f}",
        **(within_span(result) if "span" in result and result["span"] < result["dimension"] else {}),
        **({"best that this chain can reach": best_of_chain(result)} if "chain_optimum" in result else {}),
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
    print_table(console, rows, f"{result['method']} on {result['problem']}")


def within_span(result: dict[str, Any]) -> dict[str, str]:
    """The row for the distance in the directions that the tilt changes."""
    where = "one dimension" if result["span"] == 1 else f"{result['span']} dimensions"
    ratio = result["distance_span"] / result["floor_span"]
    return {f"within the {where} of the tilt": f"{result['distance_span']:.4f}   ({ratio:.2f} x its floor)"}


def best_of_chain(result: dict[str, Any]) -> str:
    """What the best control of the chain would reach, or why it is not known."""
    best = result["chain_optimum"]
    if best is None:
        return str(result["chain_optimum_missing"])
    return f"{best['distance']:.4f}, mean reward {best['reward']:.4f}   (exact, {best['num_inference_steps']} steps)"
