"""Metrics of an independent classifier, the judge: classes, confidence and features of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltflow.data import load_images
from tiltflow.evaluation.distances import histogram_distance, histogram_masses, total_variation
from tiltflow.evaluation.estimates import Estimate, entropy, mean_estimate, one_hot, total_variance
from tiltflow.evaluation.features import frechet_distance
from tiltflow.evaluation.metrics import Found, Metric, Section
from tiltflow.evaluation.samples import Instruments, Judge, Samples, Seen
from tiltflow.evaluation.settings import Evaluation
from tiltflow.evaluation.verdict import class_tests, distance_test, share_test

GROUP = (
    Metric(
        "judge.group.base",
        "Share of {group}, base",
        "Share of samples of the base model in these classes, by the judge.",
        unit="share",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "judge.group.tuned",
        "Share of {group}, tuned",
        "The same for the tuned model.",
        better="up",
        unit="share",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "judge.group.target",
        "Share of {group}, target",
        "The same under the target law, estimated from weighted base samples.",
        unit="share",
        section=Section.CLOSE,
    ),
)

FRECHET = (
    Metric(
        "judge.frechet_base",
        "Fréchet distance, base",
        "Fréchet distance between the judge's features of samples and of real images.",
        section=Section.SURE,
    ),
    Metric(
        "judge.frechet_tuned",
        "Fréchet distance, tuned",
        "The same for the tuned model.",
        better="down",
        section=Section.SURE,
        compared=True,
    ),
    Metric(
        "judge.frechet_real",
        "Fréchet distance, real",
        "The same between two halves of the real images.",
        section=Section.SURE,
    ),
)

CONFIDENCE = (
    Metric(
        "judge.sure_base",
        "Judge is sure, base",
        "Share of samples whose likeliest class has a probability above {judge.sure_above}.",
        section=Section.SURE,
    ),
    Metric(
        "judge.sure_tuned",
        "Judge is sure, tuned",
        "The same for the tuned model.",
        better="up",
        section=Section.SURE,
        compared=True,
    ),
    Metric(
        "judge.confidence_base",
        "Judge's confidence, base",
        "Mean probability that the judge gives to the class it decides for.",
        unit="share",
        section=Section.SURE,
    ),
    Metric(
        "judge.confidence_tuned",
        "Judge's confidence, tuned",
        "The same for the tuned model. A clear fall means samples that look less like the data.",
        better="up",
        unit="share",
        section=Section.SURE,
    ),
)

VARIETY = (
    Metric(
        "judge.entropy_base",
        "Entropy of classes, base",
        "Entropy of the judge's class histogram, in nats; 0 if only one class is left.",
        unit="nats",
        section=Section.VARIED,
        compared=True,
    ),
    Metric(
        "judge.entropy_tuned",
        "Entropy of classes, tuned",
        "The same for the tuned model.",
        better="up",
        unit="nats",
        section=Section.VARIED,
        compared=True,
    ),
    Metric(
        "judge.variance_base",
        "Variance of features, base",
        "Total variance of the judge's features: how much samples differ from each other.",
        section=Section.VARIED,
        compared=True,
    ),
    Metric(
        "judge.variance_tuned",
        "Variance of features, tuned",
        "The same for the tuned model.",
        better="up",
        section=Section.VARIED,
        compared=True,
    ),
)

METRICS = (*GROUP, *FRECHET, *CONFIDENCE, *VARIETY)


def measure(seen: Seen) -> Found:
    """Compute the judge's class histograms of base, tuned and target, their total variation, confidence, Fréchet distances, and
    tests against the target. Values of the target are None if it is unknown; there is no entry without a judge."""
    judge, samples, settings = seen.instruments.judge, seen.samples, seen.settings
    if judge is None:
        return Found({"judge": None})
    probabilities = [seen.instruments.look(judge.probabilities, x) for x in (samples.base, samples.tuned)]
    entries = {"model": judge.name, "class_names": list(judge.config.class_names)}
    entries |= of_classes(probabilities, settings, judge) | of_features(seen.instruments, judge, samples, settings)
    if samples.weights.unknown() is not None:
        return Found({"judge": entries})
    return of_target(probabilities, entries, settings, judge, samples, seen.generator)


def of_classes(probabilities: list[Tensor], settings: Evaluation, judge: Judge) -> dict[str, Any]:
    """Return histograms and confidence of the base and the tuned model, from class probabilities [n, classes] of both."""
    p_base, p = probabilities
    names, members = judge.config.class_names, torch.tensor(settings.group, dtype=torch.long)
    base_histogram, ours = (one_hot(each.argmax(1), len(names)).mean(0) for each in probabilities)
    sure_base, sure = ((each.amax(1) > settings.confidence).double() for each in probabilities)
    found: dict[str, Any] = {
        "base": base_histogram.tolist(),
        "tuned": ours.tolist(),
        "target": None,
        "target_error": None,
        "sure_above": settings.confidence,
        **mean_estimate(sure_base).named("sure_base"),
        **mean_estimate(sure).named("sure_tuned"),
        "confidence_base": p_base.amax(1).mean().item(),
        "confidence_tuned": p.amax(1).mean().item(),
        "entropy_base": entropy(base_histogram),
        "entropy_tuned": entropy(ours),
    }
    if settings.group:
        of_group_base, of_group = (torch.isin(each.argmax(1), members).double() for each in probabilities)
        found["group"] = {
            "label": ", ".join(names[i] for i in settings.group),
            "base": of_group_base.mean().item(),
            **mean_estimate(of_group).named("tuned"),
            "target": None,
            "target_error": None,
        }
    return found


def of_features(instruments: Instruments, judge: Judge, samples: Samples, settings: Evaluation) -> dict[str, Any]:
    """Return the variance of the judge's features, and their Fréchet distance to real images, if there are any."""
    f_base, f = (instruments.look(judge.features, x) for x in (samples.base, samples.tuned))
    found = {"variance_base": total_variance(f_base), "variance_tuned": total_variance(f)}
    if settings.data is not None:
        f_real = instruments.look(judge.features, real_images(settings.data))
        found["frechet_base"], found["frechet_tuned"] = frechet_distance(f_base, f_real), frechet_distance(f, f_real)
        found["frechet_real"] = frechet_distance(*f_real.chunk(2))
    return found


def of_target(
    probabilities: list[Tensor],
    entries: dict[str, Any],
    settings: Evaluation,
    judge: Judge,
    samples: Samples,
    generator: torch.Generator,
) -> Found:
    """Estimate the judge's histogram under the target law, and test the tuned model against it."""
    names, weights = judge.config.class_names, samples.weights
    labels_base, labels = (each.argmax(1) for each in probabilities)
    sure_base, sure = ((each.amax(1) > settings.confidence).double() for each in probabilities)
    distance, _, target = histogram_distance(labels, labels_base, weights, len(names), generator)
    of_base = total_variation(one_hot(labels_base, len(names)).mean(0), target)
    null = weights.null_distances(len(labels), [histogram_masses(labels_base, len(names))], generator)[0]
    entries |= {"target": target.tolist(), "target_error": weights.mean(one_hot(labels_base, len(names)))[1].tolist()}
    group_test = None
    if settings.group:
        members = torch.tensor(settings.group)
        of_group_base, of_group = (torch.isin(each, members).double() for each in (labels_base, labels))
        group_test = share_test(f"share of classes {entries['group']['label']}", of_group, of_group_base, weights)
        entries["group"] |= Estimate(*map(float, weights.mean(of_group_base))).named("target")
    tests = [
        group_test,
        *class_tests(labels, labels_base, weights, names, settings.group),
        share_test(f"share of samples of which the judge is sure above {settings.confidence:g}", sure, sure_base, weights),
        distance_test("total variation of the classes", distance.value, of_base, null),
    ]
    of_distance = {
        **distance.named("target_distance"),
        "target_distance_base": of_base,
        "target_distance_floor": null.mean().item(),
        "target_distance_kind": "total variation of the judge's class histogram to the importance-weighted base's",
    }
    return Found({"judge": entries, **of_distance}, tuple(row for row in tests if row is not None))


def real_images(path: str) -> Tensor:
    """Load up to 10,000 real images. Raises InputError if they cannot be read."""
    return load_images(path, "test").images[:10_000]
