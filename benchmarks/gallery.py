"""Pictures of docs/gallery.md that no report draws: a toy, a policy, molecules.

    python benchmarks/gallery.py toy docs/gallery-toy.png               # as `tiltflow verify mixture --iterations 300`
    python benchmarks/gallery.py control docs/gallery-control.png       # as `tiltflow verify bandit`
    python benchmarks/gallery.py molecules plain.sdf chosen.sdf docs/gallery-molecules.png     # files of `tiltflow sample`

The first two train, a minute each or less on an idle core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tiltflow.laws.gaussian_mixture import GaussianMixture
from tiltflow.problems.bandit import Bandit
from tiltflow.problems.verification.verify import once, read_verification
from tiltflow.samplers.rollout import sample
from tiltflow.streams import stream

BASE, TUNED, LAW = "#8a8f98", "#3b5bdb", "#e8590c"
COUNT = 3000


def toy() -> Figure:
    """Eight modes in the plane: samples of the base, of the tuned model, and of the exact law."""
    settings = read_verification("mixture", overrides=["iterations=300"])
    fitted, law = once(settings, lambda record: None), settings.problem.exact_law(settings.method, settings.iterations)
    x, generator = torch.randn(COUNT, 2, generator=stream(0, "noise")), stream(0, "path")
    before, after = (sample(flow, x, settings.method.sampling, generator) for flow in (fitted.base, fitted.tuned))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")
    exact = law.sample(COUNT, stream(0, "exact"))
    for axis, title, points, colour in zip(
        axes, ("base", "tuned", "exact law"), (before, after, exact), (BASE, TUNED, LAW), strict=True
    ):
        axis.scatter(*points.T, s=2, alpha=0.4, color=colour, linewidths=0)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
    return figure


def control() -> Figure:
    """Actions at three observations: those of the policy before and after, and the density of the exact law."""
    settings = read_verification("bandit")
    problem = settings.problem
    assert isinstance(problem, Bandit)
    fitted, laws = once(settings, lambda record: None), problem.exact_law(settings.method, settings.iterations)
    figure, axes = plt.subplots(1, len(laws), figsize=(9, 2.8), sharey=True, layout="constrained")
    grid = torch.linspace(-2, 2, 400, dtype=torch.float64)
    for axis, seen, law in zip(axes, problem.observations, laws, strict=True):
        x, bound = torch.randn(COUNT, 1, generator=stream(0, "noise")), torch.full((COUNT, 1), seen)
        for flow, label, colour in ((fitted.base, "behaviour", BASE), (fitted.tuned, "tuned", TUNED)):
            actions = sample(flow.bind(bound), x, problem.sampling, stream(0, "path"))
            axis.hist(actions.flatten(), bins=60, range=(-2, 2), density=True, alpha=0.5, color=colour, label=label)
        axis.plot(grid, density(law, grid), color=LAW, label="exact law")
        axis.set(title=f"observation {seen:g}", xlabel="action", yticks=[])
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def density(law: GaussianMixture, x: Tensor) -> Tensor:
    """Of a mixture on the line, at x [n]."""
    scale = law.variances.sqrt()
    return (law.log_weights.exp() / scale * torch.exp(-(((x[:, None] - law.means.T) / scale) ** 2) / 2)).sum(1) / math.sqrt(
        2 * math.pi
    )


def molecules(before: Path, after: Path) -> Figure:
    """The first connected, valid molecules of two .sdf files, as RDKit draws them, in two rows."""
    from rdkit import Chem
    from rdkit.Chem import Draw

    figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), layout="constrained")
    for axis, path in zip(axes, (before, after), strict=True):
        valid = (each for each in Chem.SDMolSupplier(str(path)) if each is not None and each.GetProp("valid") == "1")
        smiles = [Chem.MolToSmiles(molecule) for molecule in valid]
        flat = [Chem.MolFromSmiles(text) for text in smiles if "." not in text][:6]
        picture = Draw.MolsToGridImage(flat, molsPerRow=6, subImgSize=(220, 180))
        axis.imshow(np.asarray(picture))
        axis.set_title(path.stem, loc="left")
        axis.axis("off")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("toy", "control", "molecules"))
    parser.add_argument("files", nargs="+", type=Path, help="the picture to write; of molecules two .sdf files before it")
    given = parser.parse_args()
    *files, output = given.files
    figure = molecules(*files) if given.what == "molecules" else {"toy": toy, "control": control}[given.what]()
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
