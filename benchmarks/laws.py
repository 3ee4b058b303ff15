"""Which law each method reaches, by quadrature on the line: no network, no training.

    python benchmarks/laws.py                              the tables of docs/laws.md
    python benchmarks/laws.py --output docs/laws.png       and the densities at beta = 0.3

Three problems at beta = 1: `bowl`, N(0, 1) with r = -x^2 / 2; `hill`, N(0.7, 0.25) with r = 1.7 x - 1.5 x^2; `modes`, two equal
modes N(-1.5, 0.25) and N(1.5, 0.25) with r = tanh x. Less than a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tiltflow.laws.adjoint_laws import deterministic_control, smoothed_tilt
from tiltflow.laws.forward_process import explicit_rounds, noise_over_signal, ram
from tiltflow.laws.induced_law import fixed_point
from tiltflow.laws.late_control import late_control
from tiltflow.laws.law import Density, Law, log_normal
from tiltflow.laws.other_laws import best_of, guided, importance_resampled
from tiltflow.laws.tilted_law import achieved_tilt, effective_share, temperature_of_kl, tilted


@dataclass(frozen=True)
class Problem:
    """A base, the standard deviation of its modes, a reward, and the curvature that damped guidance takes it to have."""

    base: Law
    std: float
    reward: Density
    curvature: float


BOWL = Problem(Law.of(lambda x: log_normal(x, 0.0, 1.0)), 1.0, lambda x: -(x**2) / 2, 1.0)
HILL = Problem(Law.of(lambda x: log_normal(x, 0.7, 0.5)), 0.5, lambda x: 1.7 * x - 1.5 * x**2, 3.0)
MODES = Problem(Law.of(lambda x: np.logaddexp(log_normal(x, -1.5, 0.5), log_normal(x, 1.5, 0.5))), 0.5, np.tanh, 1.0)

LAWS: dict[str, Callable[[Problem, float], Law]] = {
    "the base": lambda p, beta: p.base,
    "the tilt": lambda p, beta: tilted(p.base, p.reward, beta),
    "explicit, 1 round": lambda p, beta: explicit_rounds(p.base, p.reward, beta, 1),
    "explicit, 4 rounds": lambda p, beta: explicit_rounds(p.base, p.reward, beta, 4),
    "RAM, exact residual": lambda p, beta: ram(p.base, p.reward, beta, "samples"),
    "RAM, clipped": lambda p, beta: ram(p.base, p.reward, beta, lowest=-0.9),
    "ADRPO": lambda p, beta: ram(p.base, p.reward, beta, "anchor"),
    "ORW-CFM-W2, α = 1": lambda p, beta: fixed_point(p.base, lambda x: p.reward(x) / beta, 1.0),
    "one of 16": lambda p, beta: importance_resampled(p.base, p.reward, beta, 16),
    "guidance": lambda p, beta: guided(p.base, p.reward, beta),
    "guidance, damped": lambda p, beta: guided(p.base, p.reward, beta, curvature=p.curvature, std=p.std),
    "control from 0.5": lambda p, beta: late_control(p.base, p.reward, beta, 0.5),
    "scores at 0.95": lambda p, beta: smoothed_tilt(p.base, p.reward, beta, 0.95),
    "control without noise": lambda p, beta: deterministic_control(p.base, p.reward, beta),
    "best of 4": lambda p, beta: best_of(p.base, p.reward, 4),
}
"""The laws, of a problem and beta, in the order of the table."""

FIGURE = (
    "explicit, 1 round",
    "RAM, clipped",
    "ADRPO",
    "ORW-CFM-W2, α = 1",
    "guidance",
    "control from 0.5",
    "control without noise",
    "best of 4",
)


def row(name: str) -> list[str]:
    """The columns of the table; dashes where a law does not exist."""
    return [*numbers(name, BOWL, moments)[1:], *numbers(name, HILL, moments), *numbers(name, MODES, tilts)]


def numbers(name: str, problem: Problem, measure: Callable[[Problem, Law], list[str]]) -> list[str]:
    """What is measured of a law, or as many dashes."""
    try:
        return measure(problem, LAWS[name](problem, 1.0))
    except ValueError:
        return ["–" for _ in measure(problem, problem.base)]


def moments(_: Problem, law: Law) -> list[str]:
    """Mean and variance."""
    return [f"{law.mean:.3f}", f"{law.variance:.3f}"]


def tilts(problem: Problem, law: Law) -> list[str]:
    """Mean reward, P(x > 0), KL from the base, achieved tilt and its R^2."""
    found = [law.expectation(problem.reward), law.positive, law.kl(problem.base)]
    share = achieved_tilt(law, problem.base, problem.reward, 1.0) if law is not problem.base else (0.0, float("nan"))
    return [f"{each + 0.0:.3f}".replace("nan", "–").replace("-0.000", "0.000") for each in (*found, *share)]


def laws() -> list[list[str]]:
    """Each law, and its numbers."""
    heads = ["law", "bowl: variance", "hill: mean", "variance", "modes: E r", "P(x > 0)", "KL", "tilt", "R²"]
    return [heads, *([name, *row(name)] for name in LAWS)]


def rounds() -> list[list[str]]:
    """Rounds of equal steps on the modes, the first and the last: the effective share of their samples, and the noise of the
    gradient that they make, in units of what the round has to learn."""
    heads = ["rounds", "effective share", "at β = 0.3", "noise of reward weighting", "of implicit tilt matching"]
    r, rows = MODES.reward(MODES.base.points), list[list[str]]()
    for n in (1, 2, 4, 8, 16):
        done = sorted({0, n - 1})
        shares = [[effective_share(MODES.base.tilt(k / n / beta * r), r / n / beta) for k in done] for beta in (1.0, 0.3)]
        noises = [noise_over_signal(MODES.base.tilt(k / n * r), MODES.reward, 1 / n) for k in done]
        cells = [" … ".join(f"{share:.2f}" for share in each) for each in shares]
        cells += [" … ".join(f"{noise[key]:.1f}" for noise in noises) for key in ("reward-weighted", "implicit")]
        rows.append([str(n), *cells])
    return [heads, *rows]


def temperatures() -> list[list[str]]:
    """The temperature of each KL, on the hill and the modes, and the mean reward that it buys on the modes."""
    rows = []
    for kl in (0.01, 0.05, 0.1, 0.5):
        hill, modes = (temperature_of_kl(p.base, p.reward, kl) for p in (HILL, MODES))
        reward = tilted(MODES.base, MODES.reward, modes).expectation(MODES.reward)
        rows.append([f"{kl:g}", f"{hill:.4f}", f"{modes:.4f}", f"{reward:.4f}"])
    return [["KL", "hill: β", "modes: β", "E r"], *rows]


def draw(path: str, beta: float) -> None:
    """One panel for each law of the figure: its density between those of the base and of the tilt."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    x, exact = MODES.base.points, tilted(MODES.base, MODES.reward, beta)
    panels = figure.subplots(len(FIGURE) // 2, 2, sharex=True, sharey=True)
    for panel, name in zip(panels.ravel(), FIGURE, strict=True):
        law = LAWS[name](MODES, beta)
        panel.fill_between(x, np.exp(exact.log_density), color="#f0c48f", label="the tilt")
        panel.plot(x, np.exp(MODES.base.log_density), color="#7f8b98", linestyle="--", label="the base")
        panel.plot(x, np.exp(law.log_density), color="#2f6fd0", linewidth=2, label="reached")
        panel.set_title(name, fontsize=12)
        panel.set(xlim=(-3.2, 3.6), ylim=(0, 1.7), yticks=[])
        text = f"E r {law.expectation(MODES.reward):.2f}\nP(x > 0) {law.positive:.2f}"
        panel.text(0.03, 0.95, text, transform=panel.transAxes, va="top", fontsize=11)
        panel.spines[["left", "right", "top"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=12)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table; draw the figure where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="PNG file of the densities")
    parser.add_argument("--beta", type=float, default=0.3, help="temperature of the figure")
    options = parser.parse_args()
    for table in (laws, rounds, temperatures):
        heads, *rows = table()
        print("\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)) + "\n", flush=True)
    if options.output:
        draw(options.output, options.beta)


if __name__ == "__main__":
    main()
