"""The verdict: tests by hand, false alarms and power by simulation, and words that say no more than the tests do."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from scipy.stats import norm, ttest_rel
from torch import Tensor

from tiltflow.evaluation.distances import histogram_masses, kolmogorov_smirnov, reward_masses, total_variation
from tiltflow.evaluation.estimates import one_hot
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.evaluation.verdict import class_tests, conclude, corrected, distance_test, mean_test, of_rewards, share_test

pytestmark = pytest.mark.usefixtures("double")

UNKNOWN = {"target_unknown": None}


def row(p: float, **changes: Any) -> dict[str, Any]:
    found = {"statistic": f"statistic {p}", "unit": "", "base": 0.0, "tuned": 1.0, "tuned_error": 0.1, "target": 1.2}
    found |= {"target_error": 0.1, "z": -1.4, "p": p, "p_base": 0.0, "error": 0.14, "counted": True}
    return found | changes


# ---- the tests ----


def test_a_mean_is_tested_with_the_errors_of_both() -> None:
    """Tuned 1, 2, 3: mean 2, variance 1. Target of base 0 and 4 at weights 3/4 and 1/4: 1, error sqrt(9/16 + 9/16)."""
    weights = ImportanceWeights(torch.tensor([0.75, 0.25]))
    found = mean_test("x", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 4.0]), weights)
    error = math.sqrt(1 / 3 + 9 / 8)
    assert (found["tuned"], found["target"], found["base"]) == (2, 1, 2)
    assert found["z"] == pytest.approx(1 / error)
    assert found["p"] == pytest.approx(2 * (1 - norm.cdf(1 / error)))
    assert found["tuned_error"] == pytest.approx(math.sqrt(1 / 3))
    assert found["target_error"] == pytest.approx(math.sqrt(9 / 8))


def test_a_share_has_the_error_of_the_targets(generator: torch.Generator) -> None:
    """A score test: a share that fell to almost nothing does not get an error of nothing with it."""
    base = (torch.arange(4000) % 10 == 0).double()
    weights = ImportanceWeights.from_log_tilt(0.3 * torch.randn(4000, generator=generator))
    target, error = weights.mean(base)
    tuned = (torch.arange(1000) == 0).double()
    found = share_test("x", tuned, base, weights)
    assert found is not None
    assert found["z"] == pytest.approx(((0.001 - target) / torch.sqrt(target * (1 - target) / 1000 + error**2)).item())


def test_groups_are_compared_within_themselves(generator: torch.Generator) -> None:
    """Without a tilt the target is the base, and the test is Student's of pairs."""
    level = 5 * torch.randn(12, generator=generator).repeat_interleave(8)
    base, tuned = level + torch.randn(96, generator=generator), level + 0.3 + torch.randn(96, generator=generator)
    found = mean_test("x", tuned, base, ImportanceWeights.from_log_tilt(torch.zeros(96), 12))
    means = [values.reshape(12, 8).mean(1).numpy() for values in (tuned, base)]
    expected = ttest_rel(*means)
    assert found["z"] == pytest.approx(expected.statistic)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["tuned_error"] == pytest.approx(means[0].std(ddof=1) / math.sqrt(12))


def test_strata_are_compared_within_themselves(generator: torch.Generator) -> None:
    """Two laws far apart, each tilted to its own: exact samples have standard normal z-scores, in the mean and in a share; one
    that is off in one stratum alone is seen, which Student's t of two differences never would."""
    centres = torch.tensor([-10.0, 10.0], dtype=torch.float64)
    z, share, off = (torch.zeros(300) for _ in range(3))
    for i in range(len(z)):
        base, tuned = (centres[:, None] + torch.randn(2, 400, generator=generator, dtype=torch.float64) for _ in range(2))
        weights = ImportanceWeights.from_log_tilt(base.flatten() / 2, 2, strata=True)
        tuned = tuned + 0.5
        z[i] = mean_test("mean", tuned.flatten(), base.flatten(), weights)["z"]
        above = [(x > centres[:, None]).double().flatten() for x in (tuned, base)]
        share[i] = mean_test("share", *above, weights, unit="share")["z"]
        tuned[0] += 0.6
        off[i] = mean_test("mean", tuned.flatten(), base.flatten(), weights)["p"]
    for each in (z, share):
        assert abs(each.mean()) < 4 / len(each) ** 0.5
        assert abs(each.std() - 1) < 0.17
    assert (off < 1e-3).double().mean() > 0.9


def test_holms_correction_by_hand() -> None:
    """Sorted .004, .013, .03, .5 times 4, 3, 2, 1, never falling; what is not counted takes no part."""
    rows = [row(0.03), row(0.004), row(0.5), row(0.0001, counted=False), row(0.013)]
    done = corrected(rows)
    assert [one["p_holm"] for one in done] == [pytest.approx(0.06), pytest.approx(0.016), 0.5, None, pytest.approx(0.039)]
    assert [one["rejected"] for one in done] == [False, True, False, False, True]
    # Bonferroni's half of .05 / 4, and four fifths of the power
    assert done[0]["detectable"] == pytest.approx((norm.ppf(1 - 0.05 / 8) + norm.ppf(0.8)) * 0.14)
    assert [one["p_holm"] for one in corrected([row(0.04), row(0.03)])] == [pytest.approx(0.06)] * 2  # 2 x .03 before 1 x .04
    json.dumps(done)


def test_what_a_test_would_have_seen_it_sees(generator: torch.Generator) -> None:
    """A shift of `detectable`, four times in five."""
    seen, repeats = 0, 400
    for _ in range(repeats):
        base, tuned = torch.randn(2, 400, generator=generator)
        weights = ImportanceWeights(torch.full((400,), 1 / 400))
        shift = corrected([mean_test("x", tuned, base, weights), *[row(1.0)] * 4])[0]["detectable"]
        found = corrected([mean_test("x", tuned + shift, base, weights), *[row(1.0)] * 4])[0]
        seen += found["rejected"]
    assert seen / repeats == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / repeats))


def test_a_distance_is_tested_against_what_is_left_where_nothing_is_wrong() -> None:
    null = torch.arange(99) / 100
    found = distance_test("x", 0.95, 2.0, null)
    assert (found["p"], found["p_base"]) == (5 / 100, 1 / 100)  # .95 to .98 are four, and itself
    assert found["target"] == pytest.approx(0.49)
    assert corrected([found])[0]["detectable"] == pytest.approx(torch.quantile(null, 0.95).item())


def test_classes_too_rare_for_a_test_are_tested_together() -> None:
    names = ["a", "b", "c", "d"]
    labels = torch.tensor([0] * 500 + [1] * 480 + [2] * 12 + [3] * 12)
    weights = ImportanceWeights(torch.full((len(labels),), 1 / len(labels)))
    found = [one["statistic"] for one in class_tests(labels, labels, weights, names)]
    assert found == ["share of class a", "share of class b", "share of the other classes, c, d"]
    # that of a, b and that of c, d are one and the same
    assert len(class_tests(labels, labels, weights, names, group=[0, 1])) == 2
    assert share_test("c", (labels == 2).double(), (labels == 2).double(), weights) is None


def test_a_share_of_all_is_not_tested_whatever_weights_sum_to() -> None:
    """In floating point they can sum to a little more than one."""
    every, weights = torch.ones(600), torch.full((600,), 1 / 600, dtype=torch.float64)
    for rounding in (-1e-15, 0, 1e-15):
        assert share_test("all", every, every, ImportanceWeights(weights + rounding)) is None
        assert share_test("none", 1 - every, 1 - every, ImportanceWeights(weights + rounding)) is None


# ---- false alarms and power ----

BETA = 2.1
EVEN = torch.tensor([1.0, 0.0] * 5)


def base_samples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of ten classes and bounded rewards, of which the even ones have the higher: like the digits."""
    labels = torch.randint(10, (count,), generator=generator)
    sign = 2 * EVEN[labels] - 1
    return labels, 3 * sign * (1 - torch.rand(count, generator=generator) ** 3)


def target_samples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Exact ones, by rejection."""
    labels, rewards = base_samples(8 * count, generator)
    kept = (torch.rand(8 * count, generator=generator) < ((rewards - 3) / BETA).exp()).nonzero()[:count, 0]
    assert len(kept) == count
    return labels[kept], rewards[kept]


def judged(labels: Tensor, rewards: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """The conclusion of tests such as a run has."""
    base_labels, base_rewards = base_samples(512, generator)
    weights = ImportanceWeights.from_rewards(base_rewards, BETA)
    measures = [histogram_masses(base_labels, 10), reward_masses(base_rewards)]
    null, null_of_reward = weights.null_distances(len(labels), measures, generator, draws=300)
    ours, theirs = (one_hot(each, 10).mean(0) for each in (labels, base_labels))
    target = weights.weights @ one_hot(base_labels, 10)
    group = share_test("share of classes 0, 2, 4, 6, 8", EVEN[labels], EVEN[base_labels], weights)
    rows = [mean_test("mean reward", rewards, base_rewards, weights), *([] if group is None else [group])]
    of_reward = (kolmogorov_smirnov(each, base_rewards, weights.weights) for each in (rewards, base_rewards))
    rows.append(distance_test("distance in reward", *of_reward, null_of_reward))
    rows += class_tests(labels, base_labels, weights, list("0123456789"), [0, 2, 4, 6, 8])
    rows.append(distance_test("total variation", total_variation(ours, target), total_variation(theirs, target), null))
    return conclude(rows, UNKNOWN)


def test_exact_samples_are_told_apart_in_one_of_twenty_runs(generator: torch.Generator) -> None:
    runs = 120
    found = [judged(*target_samples(512, generator), generator) for _ in range(runs)]
    alarms = sum(any(one["rejected"] for one in each["tests"]) for each in found)
    assert alarms / runs < 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)
    assert len(found[0]["tests"]) >= 8
    assert sum(each["verdict"]["tone"] == "good" for each in found) == runs - alarms
    said = [each["verdict"]["text"] for each in found if each["verdict"]["tone"] == "good"]
    assert all(" tests do not distinguish the tuned model from the target law." in text for text in said)


def test_exact_pictures_of_prompts_are_told_apart_in_one_of_twenty_runs(generator: torch.Generator) -> None:
    """Twelve prompts, each with a level of its own, 32 pictures, a tilt of one standard deviation, a held-out reward."""
    runs, alarms = 120, 0
    for _ in range(runs):
        level = 2 * torch.randn(12, generator=generator).repeat_interleave(32)
        base, tuned, other, other_tuned = torch.randn(4, 384, generator=generator)
        base, tuned = level + base, level + 1 + tuned
        weights = ImportanceWeights.from_log_tilt(base, 12)
        entries, rows = of_rewards(tuned, base, weights, generator, group="prompt", draws=400)
        rows.append(mean_test("mean held-out", tuned / 2 + other_tuned, base / 2 + other, weights))
        alarms += any(one["rejected"] for one in conclude(rows, entries)["tests"])
    assert alarms / runs < 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)


def test_a_group_and_a_class_that_are_short_are_seen(generator: torch.Generator) -> None:
    """Three in five of one class gone to another: the verdict names what differs, with both numbers."""
    seen = 0
    for _ in range(10):
        labels, rewards = target_samples(1024, generator)
        labels[(labels == 4) & (torch.rand(1024, generator=generator) < 0.6)] = 0
        found = judged(labels, rewards, generator)
        rejected = [one["statistic"] for one in found["tests"] if one["rejected"]]
        seen += "share of class 4" in rejected
        if "share of class 4" in rejected:
            assert found["verdict"]["tone"] == "fair"
            assert "share of class 4" in found["verdict"]["text"]
            assert "(z −" in found["verdict"]["text"]
    assert seen >= 8


# ---- the words ----


def test_the_most_that_is_said() -> None:
    text = conclude([row(0.3), row(0.5, unit="share", statistic="share of class a")], UNKNOWN)["verdict"]["text"]
    assert text.startswith("These 2 tests do not distinguish the tuned model from the target law. With 80% power, they detect")
    assert "a mean" not in text
    assert "points" in text
    assert "equal" not in text
    assert "same" not in text


def test_tests_that_do_not_tell_even_the_base_apart_say_little() -> None:
    verdict = conclude([row(0.3, p_base=0.2), row(0.5, p_base=0.04)], UNKNOWN)["verdict"]
    assert verdict["tone"] == "fair"
    assert "neither the tuned nor the base model" in verdict["text"]


def test_what_was_calibrated_is_not_counted_and_that_is_said() -> None:
    verdict = conclude([row(0.0001, statistic="mean reward", counted=False), row(0.5)], UNKNOWN)["verdict"]
    assert verdict["tone"] == "good"
    assert verdict["text"].startswith("This test does not")
    assert "The mean reward is not counted: training was calibrated on it" in verdict["text"]


def test_no_verdict_where_the_target_is_not_known(generator: torch.Generator) -> None:
    base = torch.randn(40, generator=generator)
    entries, rows = of_rewards(base + 1, base, ImportanceWeights.from_rewards(base, 0.2), generator)
    assert "effective_sample_size_of_group" not in entries  # there is one group
    found = conclude(rows, entries)
    assert found["tests"] == []
    assert found["verdict"]["text"] == f"No verdict: the target law is unknown. {entries['target_unknown']}"
    assert {entries[key] for key in entries if key.startswith(("reward_", "target_d", "path"))} == {None}


def test_a_model_no_nearer_than_the_base_is_called_so() -> None:
    summary = {
        "target_distance": 0.4,
        "target_distance_base": 0.41,
        "target_distance_floor": 0.03,
        "target_distance_error": 0.02,
    }
    found = conclude([row(1e-9)], UNKNOWN | summary | {"target_distance_kind": "total variation"})["verdict"]
    assert found["tone"] == "poor"
    nearer = conclude([row(1e-9)], UNKNOWN | summary | {"target_distance": 0.1, "target_distance_kind": "total variation"})
    assert nearer["verdict"]["tone"] == "fair"
    assert "it is 82% of the way from the base" in nearer["verdict"]["text"]  # .31 of .38


@pytest.mark.parametrize(("members", "tested"), [(8, False), (100, True), (412, True), (504, False)])
def test_a_share_of_few_members_or_of_few_others_is_not_tested(members: int, tested: bool) -> None:
    """20 of each kind are needed for a share to be a normal number."""
    of_group = (torch.arange(512) < members).double()
    weights = ImportanceWeights(torch.full((512,), 1 / 512, dtype=torch.float64))
    assert (share_test("share", of_group, of_group, weights) is not None) == tested


@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_said_of_groups_where_there_are_several(groups: int, generator: torch.Generator) -> None:
    rewards = torch.randn(800, generator=generator)
    weights = ImportanceWeights.from_log_tilt(0.1 * rewards, groups)
    entries, _ = of_rewards(rewards, rewards, weights, generator, draws=100)
    for key in ("effective_sample_size_of_group", "reward_target_bias"):
        assert (key in entries) == (groups > 1)
