"""2-Wasserstein distance between tuned and base samples."""

from __future__ import annotations

from torch import Tensor

from tiltflow.evaluation.distances import exact_w2
from tiltflow.evaluation.metrics import Cost, Found, Metric, Section
from tiltflow.evaluation.molecules import are_molecules, plain
from tiltflow.evaluation.samples import Asked, Seen

MOST = 1024  # points for the exact distance, whose cost is quadratic in them

METRICS = (
    Metric(
        "w2_base",
        "W2 to the base",
        "2-Wasserstein distance between samples of the two models ({w2_space}).",
        better="down",
        section=Section.VARIED,
        compared=True,
        cost=Cost("w2_floor", "between two samples of the base"),
    ),
    Metric(
        "w2_floor",
        "W2, floor",
        "The same between two samples of the base: the expected value if the models are equal.",
        section=Section.VARIED,
        compared=True,
    ),
)


def measure(seen: Seen) -> Found:
    """Compute the distance between samples of different noise, and its floor, that between two halves of the base: in the
    judge's features, in `features`, or of the samples themselves.

    It is not computed in the pixels of pictures of prompts: with few pictures of each, all distances are about the same.
    """
    instruments, samples = seen.instruments, seen.samples
    if instruments.judge is not None:
        judge = instruments.judge
        space, (base, tuned) = f"features of {judge.name}", (instruments.look(judge.features, x) for x in samples.both)
    elif instruments.extract is not None:
        extract = instruments.extract
        space, (base, tuned) = f"features of {seen.settings.features}", (instruments.features(x, extract) for x in samples.both)
    elif samples.asked.kind == "prompt":
        return Found()
    else:
        space = "fingerprints" if are_molecules(samples.base) else "samples"
        base, tuned = (plain(x, clamped=False).flatten(1) for x in samples.both)
    return Found({**distance_to_base(tuned, base, samples.asked), "w2_space": space})


def distance_to_base(tuned: Tensor, base: Tensor, asked: Asked) -> dict[str, float]:
    """Return the distances between tuned and base samples [n, d] of different noise, and between two halves of the base. Each
    group is halved, so that both halves contain all groups."""
    first, last = asked.halves(MOST)
    ours = first[first < len(tuned)]  # fewer, if more samples of the tuned model had no finite reward
    return {"w2_base": exact_w2(tuned[ours], base[last]), "w2_floor": exact_w2(base[first], base[last])}
