"""What an independent classifier sees in samples: classes, confidence, features."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section

GROUP = (
    Metric(
        "judge.group.base",
        "Share of {group}, base",
        "How often the judge sees them in samples of the untouched model.",
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
        "The same under the target law, from weighted base samples.",
        unit="share",
        section=Section.CLOSE,
    ),
)

FRECHET = (
    Metric(
        "judge.frechet_base",
        "Fréchet distance, base",
        "Between Gaussian fits to the judge's features of samples and of real images; lower is better.",
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
        "The same. A clear fall means samples that look less like the data.",
        better="up",
        unit="share",
        section=Section.SURE,
    ),
)

VARIETY = (
    Metric(
        "judge.entropy_base",
        "Entropy of classes, base",
        "Of the judge's class histogram, in nats; 0 if one class is left.",
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
        "How much samples differ from each other: the trace of the covariance of the judge's features.",
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
