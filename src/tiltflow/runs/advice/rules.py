"""The rules of `tiltflow advise`: a table of conditions, what follows, why, and the page that shows it.

Of the rules about one thing, the first that holds is taken. What is measured stands on the page that a rule names, with the
command that measures it; a rule says no more than that, and what the scoreboard has of its method in about as many dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tiltflow.formatting import decimal
from tiltflow.plugins import find, own_names
from tiltflow.runs.advice.facts import Facts
from tiltflow.runs.advice.scoreboard import in_words, measured

About = Literal["method", "temperature", "settings", "sampling", "evaluation", "without training"]


@dataclass(frozen=True)
class Rule:
    """A rule.

    Args:
        about: what it is about.
        holds: whether it applies.
        choice: what to do, in a few words.
        why: the reason, in a sentence.
        page: in docs, with the section.
        overrides: settings of the recipe, `key=value`.
    """

    about: About
    holds: Callable[[Facts], bool]
    choice: Callable[[Facts], str]
    why: Callable[[Facts], str]
    page: str
    overrides: Callable[[Facts], Sequence[str]] = lambda facts: ()


@dataclass(frozen=True)
class Advice:
    """What a rule says of a recipe; see `Rule`."""

    about: About
    choice: str
    why: str
    page: str
    overrides: Sequence[str]


NEARER = 1.5
"""How many times nearer a method has to be, in floors, to be preferred to the one that is usual."""
PATHS = 3
"""Most dimensions in which weights of paths were measured beside so strong a tilt."""


def method(name: str, first: str = "") -> Callable[[Facts], Sequence[str]]:
    """Overrides that make a method the recipe's, at its temperature and with its own optimizer; none where it is that already.

    Args:
        first: the method that it begins with, for 200 steps.
    """

    def overrides(facts: Facts) -> list[str]:
        begins = f", first: {{name: {first}, beta: {facts.beta:g}}}, first_steps: 200" if first else ""
        return [] if facts.method == name else [f"method={{name: {name}, beta: {facts.beta:g}{begins}}}", "optimizer={}"]

    return overrides


def by_paths(facts: Facts) -> bool:
    """Whether weights of paths are to end what another method begins."""
    return facts.strong and facts.dimension <= PATHS and not facts.learned


def by_regression(facts: Facts) -> bool:
    """Whether Tilt Matching, which asks for no gradient of the reward, is what to take: where there is none, and where in about
    as many dimensions it ended far nearer to the target law than Adjoint Matching at equal cost."""
    if facts.learned or not facts.differentiable:
        return not facts.learned
    found = measured(facts.dimension, ("tilt-matching", "adjoint-matching"))
    return not facts.strong and found is not None and NEARER * found[1]["tilt-matching"] < found[1]["adjoint-matching"]


def fields(facts: Facts) -> bool:
    """Whether the method that is advised learns a velocity field, and not a chain."""
    return not facts.learned and (by_paths(facts) or by_regression(facts))


def carried(facts: Facts) -> str:
    """How many base samples carry the weight, in words."""
    return f"{decimal(facts.effective)} of {facts.count} base samples carry the weight of the law at beta = {facts.beta:g}"


def beside(name: str, facts: Facts) -> str:
    """What the scoreboard says of a method in about as many dimensions, beside the others that this reward could have."""
    others = [each for each in own_names("methods") if fits(each, facts)]
    return in_words(name, facts.dimension, others, black_box=not facts.differentiable)


def fits(name: str, facts: Facts) -> bool:
    """Whether a method could have this reward."""
    return facts.differentiable or not find("methods", name)().needs.reward_gradient


def sentences(*said: str) -> str:
    """Those that say something, one after the other."""
    return " ".join(filter(None, said))


RULES: tuple[Rule, ...] = (
    Rule(
        "method",
        lambda facts: facts.learned,
        lambda facts: "score-as-action",
        lambda facts: "The reward learns while it is used, which this method lets it do, with a critic that waits for it.",
        "score-as-action.md#few-steps",
        method("score-as-action"),
    ),
    Rule(
        "method",
        lambda facts: by_paths(facts) and facts.differentiable,
        lambda facts: "path-reweighted after adjoint-matching",
        lambda facts: (
            f"{carried(facts)}: no base samples can be weighted toward it, and what the control of a chain leaves of such a"
            " tilt, weights of its paths supply."
        ),
        "exactness.md#measured",
        method("path-reweighted", first="adjoint-matching"),
    ),
    Rule(
        "method",
        by_paths,
        lambda facts: "path-reweighted after tilt-matching",
        lambda facts: (
            f"{carried(facts)}, and the reward has no gradient: rounds of tilt-matching get there, and weights of paths remove"
            " the errors that add up over them."
        ),
        "exactness.md#measured",
        method("path-reweighted", first="tilt-matching"),
    ),
    Rule(
        "method",
        lambda facts: facts.differentiable and by_regression(facts),
        lambda facts: "tilt-matching",
        lambda facts: sentences(
            "The reward has a gradient, which this method does not ask for; at equal cost it came nearer to the target law all"
            " the same.",
            beside("tilt-matching", facts),
        ),
        "scoreboard.md#three-modes-in-16-dimensions",
        method("tilt-matching"),
    ),
    Rule(
        "method",
        lambda facts: facts.differentiable,
        lambda facts: "adjoint-matching",
        lambda facts: sentences(
            "The reward has a gradient; no critic, replay or likelihood is needed.", beside("adjoint-matching", facts)
        ),
        "adjoint-matching.md",
        method("adjoint-matching"),
    ),
    Rule(
        "method",
        lambda facts: True,
        lambda facts: "tilt-matching",
        lambda facts: sentences(
            "The reward has no gradient; of a black box at equal numbers of rewards this method came nearer to its target than"
            " policy gradients did.",
            beside("tilt-matching", facts),
        ),
        "tilt-matching.md#a-black-box-at-equal-rewards",
        method("tilt-matching"),
    ),
    Rule(
        "temperature",
        lambda facts: facts.strong,
        lambda facts: f"beta = {facts.reachable:.3g} or more, if the report is to check the law",
        lambda facts: f"{carried(facts)}; at {facts.reachable:.3g} one in twenty does, and an evaluation can check the law.",
        "evaluation.md#when-the-target-is-known",
    ),
    Rule(
        "temperature",
        lambda facts: facts.weak and facts.modest is not None,
        lambda facts: f"beta = {facts.modest:.3g} for a tilt of half a nat",
        lambda facts: f"At beta = {facts.beta:g} the law is nearly the base: rewards have a spread of {facts.spread:.2g} beta.",
        "mathematics.md#a-kl-budget-in-place-of-a-temperature",
        lambda facts: [f"method.beta={facts.modest:.3g}"],
    ),
    Rule(
        "temperature",
        lambda facts: True,
        lambda facts: f"beta = {facts.beta:g}, as it is",
        lambda facts: f"{carried(facts)}: a tilt of {decimal(facts.kl)} nats, which base samples resemble.",
        "mathematics.md#the-tilted-law",
    ),
    Rule(
        "settings",
        lambda facts: not (fields(facts) or facts.strong or facts.learned or facts.calibrated or facts.conditions > 1),
        lambda facts: "training.calibration_samples = 1024",
        lambda facts: "A short run lacks reward that base samples of the target's law have: a working temperature corrects it.",
        "adjoint-matching.md#the-right-mean-trainingcalibration_samples",
        lambda facts: ["training.calibration_samples=1024"],
    ),
    Rule(
        "sampling",
        lambda facts: bool(facts.few_steps),
        lambda facts: "the solver and the number of steps that the model was distilled for",
        lambda facts: facts.few_steps,
        "text-to-image.md#models-distilled-to-few-steps",
    ),
    Rule(
        "sampling",
        fields,
        lambda facts: "heun",
        lambda facts: (
            "What is learned is a velocity field, which a few steps of Heun's ODE read more exactly than as many of an SDE."
        ),
        "exactness.md#sampling-what-was-learned",
        lambda facts: ["sampling={solver: heun, num_inference_steps: 20}"],
    ),
    Rule(
        "evaluation",
        lambda facts: facts.evaluation is not None,
        lambda facts: facts.evaluation[1] if facts.evaluation else "",
        lambda facts: f"{facts.evaluation[0]}: the report has no verdict otherwise." if facts.evaluation else "",
        "evaluation.md#when-the-target-is-known",
    ),
    Rule(
        "without training",
        lambda facts: facts.share >= 0.1 and not facts.learned,
        lambda facts: f"importance-resampling, if you need few samples: about {1 / facts.share:.0f} candidates for each",
        lambda facts: f"{carried(facts)}, so choosing among base samples has the same law, at that price for every sample.",
        "steering.md#importance-resampling",
    ),
)


def advise(facts: Facts) -> Iterator[Advice]:
    """What the rules say: of those about one thing, the first that holds."""
    said: set[About] = set()
    for rule in RULES:
        if rule.about not in said and rule.holds(facts):
            said.add(rule.about)
            yield Advice(rule.about, rule.choice(facts), rule.why(facts), f"docs/{rule.page}", tuple(rule.overrides(facts)))
