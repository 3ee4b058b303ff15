"""The alarm: its rule on looks whose answer is known, and a run in which training takes a loophole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate, entropy, total_variance
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.evaluation.monitor import (
    LOOKS,
    Look,
    find_alarm,
    from_row,
    look_at,
    over_groups,
    read_looks,
    spread,
    spread_of_target,
    surprise,
    target_measures,
    to_row,
)
from tiltflow.evaluation.pictures import COLOURS, colour_entropy, edge_energy
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream


def look(step: int, reward: float, quality: float, error: float = 0.1) -> Look:
    return Look(step, Estimate(reward, error), {"quality": Estimate(quality, error)})


# ---- the rule ----

RISE = 3 * 2**0.5 * 0.1  # what is just beyond the noise of two looks


@pytest.mark.parametrize(
    ("looks", "raised"),
    [
        ([look(0, 0, 5), look(1, 2, 4)], True),
        ([look(0, 0, 5), look(1, 2, 5)], False),  # the reward rises, and nothing falls
        ([look(0, 0, 5), look(1, 0, 4)], False),  # something falls, without a gain in reward
        ([look(0, 0, 5), look(1, -2, 4)], False),
        ([look(0, 0, 5), look(1, RISE + 0.01, 5 - RISE - 0.01)], True),
        ([look(0, 0, 5), look(1, RISE - 0.01, 4)], False),
        ([look(0, 0, 5), look(1, 2, 5 - RISE + 0.01)], False),
        ([look(0, 0, 5), look(1, 1, 6), look(2, 2, 5.2)], True),  # it had risen, and fell while the reward went on
        ([look(0, 0, 5), look(1, 2, 4), look(2, 2, 5)], False),  # it came back: the last look is clean
    ],
)
def test_the_rule(looks: list[Look], raised: bool) -> None:
    alarm = find_alarm(looks)
    assert (alarm is not None) == raised
    if alarm is not None:
        assert f"step {looks[-1].step}: the reward rose" in alarm
        assert "quality fell" in alarm


def test_what_the_target_law_loses_too_is_no_alarm() -> None:
    """A tilt towards one class has less variety than the base, and should."""
    looks = [look(0, 0, 5), look(1, 2, 4)]
    assert find_alarm(looks, {"quality": Estimate(3.9, 0.1)}) is None
    assert find_alarm(looks, {"quality": Estimate(4.3, 0.1)}) is None  # within the noise of both
    alarm = find_alarm(looks, {"quality": Estimate(4.6, 0.1)})
    assert alarm is not None
    assert "where the target law has 4.6" in alarm
    assert find_alarm(looks, {"other": Estimate(0, 1)}) is not None


def test_false_alarms_are_as_rare_as_their_noise() -> None:
    """Looks at one and the same law: each comparison goes beyond 3 standard errors in 1 of 740, and needs two at once."""
    generator, raised = stream(0, "looks"), 0
    for _ in range(2000):
        values = torch.randn(6, 2, generator=generator).tolist()
        looks = [look(i, reward, quality, error=1.0) for i, (reward, quality) in enumerate(values)]
        raised += any(find_alarm(looks[: i + 1]) is not None for i in range(1, 6))
    assert raised <= 2


# ---- the measures ----


def test_spread_is_the_variance_and_that_of_the_target_is_the_weighted_one() -> None:
    x = torch.randn(500, 3, generator=stream(0, "x"), dtype=torch.float64)
    assert spread(x).mean().item() == pytest.approx(x.var(0).sum().item())
    # N(0, 1) in each direction, tilted by exp(c x_0): its mean moves by c, its variance stays
    many = torch.randn(200_000, 3, generator=stream(1, "x"), dtype=torch.float64)
    tilt = 0.5 * many[:, 0]
    found = target_measures({"spread": spread_of_target(many, tilt), "first": many[:, 0]}, tilt)
    assert found is not None
    assert abs(found["spread"].value - 3) < 4 * found["spread"].standard_error
    assert abs(found["first"].value - 0.5) < 4 * found["first"].standard_error
    few = {"first": many[:60, 0]}  # worth at most 60 samples, fewer than say what a law is
    assert target_measures(few, tilt[:60]) is None
    assert total_variance(x) == pytest.approx(x.var(0, correction=0).sum().item())


def test_edges_and_colours_of_pictures_whose_answer_is_known() -> None:
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    plain, board = torch.full((3, 8, 8), 0.3), (1.0 - 2 * ((rows + columns) % 2)).expand(3, 8, 8)
    halves, ramp = torch.where(columns < 4, -1.0, 1.0).expand(3, 8, 8), (columns / 3.5 - 1).expand(3, 8, 8)
    x = torch.stack([plain, board, halves, ramp, 5 * board])  # of what is beyond [-1, 1] nothing is seen
    # of the 56 differences across, one column of 8 is 1 in `halves`, and all are 1 / 7 in `ramp`; those down are 0
    assert edge_energy(x).tolist() == pytest.approx([0, 1, 1 / 14, 1 / 14, 1])
    assert colour_entropy(x).tolist() == pytest.approx([0, math.log(2), math.log(2), math.log(4), math.log(2)])
    levels = (torch.arange(4) + 0.5) / 2 - 1
    every = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 8, 8)
    greys = ((torch.arange(64) + 0.5) / 32 - 1).reshape(1, 1, 8, 8)
    for each in (every, greys):  # each colour in one pixel
        assert colour_entropy(each).item() == pytest.approx(math.log(COLOURS))
    assert edge_energy(torch.full((1, 1, 8, 8), math.nan)).isnan().all()
    assert colour_entropy(torch.full((1, 1, 8, 8), math.nan)).isfinite().all()


def test_the_mean_surprise_is_the_entropy_and_its_error_covers_it() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    labels = torch.multinomial(p, 400 * 200, replacement=True, generator=stream(0, "labels")).reshape(400, 200)
    found = [look_at(0, {"reward": row.double(), "classes": surprise(row)}).held_out["classes"] for row in labels]
    shares = torch.bincount(labels[0], minlength=4) / 200
    assert found[0].value == pytest.approx(entropy(shares))
    away = torch.tensor([(each.value - (entropy(p) - 3 / 400)) / each.standard_error for each in found])  # Miller and Madow
    assert abs(away.mean()) < 4 / 400**0.5
    assert abs(away.std() - 1) < 4 / 800**0.5
    # tilted by exp(c) in the first class, the law has p_0 exp(c) / (1 + p_0 (exp(c) - 1)) of it
    many, tilt = labels.flatten()[:20_000], torch.where(labels.flatten()[:20_000] == 0, 1.0, 0.0)
    target = p * torch.tensor([math.e, 1, 1, 1]) / (p * torch.tensor([math.e, 1, 1, 1])).sum()
    weights = ImportanceWeights.from_log_tilt(tilt).weights
    under = target_measures({"classes": surprise(many, weights)}, tilt)
    assert under is not None
    assert abs(under["classes"].value - entropy(target)) < 4 * under["classes"].standard_error
    # what is left of the entropy once the group is known: half of the weight on 0 and 1, half on 2 and 3
    some, group = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 1])
    assert (surprise(some) - surprise(group)).mean().item() == pytest.approx(math.log(2) / 2)
    assert surprise(torch.full((9,), 2)).tolist() == pytest.approx([0.0] * 9)


def test_a_text_that_reads_better_while_the_ground_behind_it_goes_is_seen() -> None:
    """The shape of a known hack: the score of the text rises, edges and colours fall by more than half, and pictures differ
    from each other as before, since their grounds have colours of their own."""
    generator = stream(0, "grounds")
    coarse = torch.rand(48, 3, 4, 4, generator=generator) * 2 - 1
    scene = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) + 0.2 * torch.randn(48, 3, 32, 32, generator=generator)
    plain = (coarse[:, :, :1, :1] * 1.6).clamp(-1, 1).expand(-1, -1, 32, 32).clone()
    letter = torch.rand(6, 16, generator=generator).round() * 2 - 1
    pictures = {0: scene, 50: plain}
    for x in pictures.values():
        x[:, :, 13:19, 8:24] = letter
    score = {0: 0.4, 50: 0.9}

    def look_of(step: int, names: tuple[str, ...]) -> Look:
        x = pictures[step]
        rewards = score[step] + 0.1 * torch.randn(48, generator=stream(step, "score"))
        known = {"edge energy": edge_energy(x), "colour entropy": colour_entropy(x), "variety": spread(x)}
        return look_at(step, {"reward": rewards} | {name: known[name] for name in names})

    before, after = (look_of(step, ("edge energy", "colour entropy")).held_out for step in (0, 50))
    for name, fall in (("edge energy", 0.6), ("colour entropy", 0.54)):
        assert after[name].value < (1 - fall) * before[name].value
        alarm = find_alarm([look_of(0, (name,)), look_of(50, (name,))])
        assert alarm is not None
        assert f"{name} fell" in alarm
    assert find_alarm([look_of(0, ("variety",)), look_of(50, ("variety",))]) is None


def test_looks_of_a_version_that_measured_less_are_compared_in_what_both_have() -> None:
    old, now = look(0, 0, 5), Look(1, Estimate(2, 0.1), {"edge energy": Estimate(0.1, 0.1), "quality": Estimate(5, 0.1)})
    assert find_alarm([old, now]) is None


def test_standard_errors_are_over_groups() -> None:
    values = torch.tensor([1.0, 1, 1, 3, 3, 3])
    assert over_groups(values, 3) == Estimate(2.0, pytest.approx(1.0))  # type: ignore[arg-type]
    assert look_at(7, {"reward": values, "other": values}, 3).held_out["other"].standard_error == pytest.approx(1)


def test_a_look_survives_its_line() -> None:
    one = look(3, 0.1, 2.5)
    assert from_row(json.loads(json.dumps(to_row(one, None, best=True)))) == one


# ---- runs ----

MONITORED = {"max_train_steps": 12, "train_batch_size": 4, "ema_decay": 0.5, "monitor": {"steps": 4, "num_samples": 16}}


def recipe_for(folder: Path, reward: Any = None, **training: Any) -> Recipe:
    method = {"name": "adjoint-matching", "num_inference_steps": 4, "beta": 1e-3}
    optimizer = {"learning_rate": 3e-2, "lr_warmup_steps": 0}
    changes = {} if reward is None else {"reward": reward}
    path = tiny_recipe(folder, method=method, optimizer=optimizer, training=MONITORED | training, **changes)
    return validate(Recipe, read_yaml(path), "recipe")


def test_a_run_looks_writes_and_keeps_the_best(tmp_path: Path) -> None:
    plain = run(recipe_for(tmp_path, monitor=None), tmp_path / "plain")
    assert "alarm" not in plain
    summary = run(recipe_for(tmp_path), tmp_path / "run")
    rows = read_looks(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert set(rows[0]["measures"]) == {
        "reward",
        "the judge's group",
        "the judge's confidence",
        "variety",
        "the entropy of the judge's classes",
        "edge energy",
        "colour entropy",
    }
    best = [row for row in rows[1:] if row["best"]][-1]
    assert best["measures"]["the judge's group"] == max(row["measures"]["the judge's group"] for row in rows[1:])
    assert summary["best_step"] == best["step"]
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    # looking changes nothing that is trained, and is not counted
    for name in ("model/model.safetensors", "after.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert summary["network_evaluations"] == plain["network_evaluations"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Monitor</h2>" in page


LOOPHOLE = {"name": "function", "path": "loophole:reward"}


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that nothing bounds: the brighter, the better."""
    (folder / "loophole.py").write_text("def reward(x):\n    return 50 * x.mean((1, 2, 3))\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)


def test_a_planted_hack_raises_the_alarm_and_stops_where_the_recipe_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch)
    told: list[str] = []
    summary = run(recipe_for(tmp_path, LOOPHOLE, max_train_steps=60), tmp_path / "run", note=told.append)
    assert summary["alarm"] is not None
    assert summary["iterations"] == 60
    assert len([text for text in told if text.startswith("ALARM")]) == 1  # once, however long it goes on
    assert "This looks like reward hacking" in (tmp_path / "run" / "report.html").read_text()

    monitor = {"steps": 4, "num_samples": 16, "stop": True}
    stopped = run(recipe_for(tmp_path, LOOPHOLE, max_train_steps=60, monitor=monitor), tmp_path / "stopped")
    assert stopped["iterations"] == stopped["alarm_step"] == summary["alarm_step"] < 60
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{stopped['iterations']:08d}").exists()


def test_a_reward_that_learns_has_no_looks_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Learning:
        network = torch.nn.Linear(1, 1)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3))

        learn = state_dict = load_state_dict = __call__

    monkeypatch.setattr("tiltflow.runs.run.build_reward", lambda *arguments, **options: Learning())
    with pytest.raises(InputError, match=r"training\.monitor: the reward learns along the way"):
        run(recipe_for(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_looks_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The looks of a run that was killed and resumed are those of the one that was not, without double or missing lines."""
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})

    class Killed(BaseException):
        pass

    def watch(record: Any) -> None:
        if record.step == 10:
            raise Killed

    whole = recipe_for(tmp_path, checkpointing_steps=3)
    resuming = recipe_for(tmp_path, checkpointing_steps=3, resume_from_checkpoint="latest")
    run(whole, tmp_path / "whole")
    with pytest.raises(Killed):
        run(resuming, tmp_path / "parts", callbacks=[watch])
    run(resuming, tmp_path / "parts")
    assert (tmp_path / "parts" / LOOKS).read_text() == (tmp_path / "whole" / LOOKS).read_text()
    assert (tmp_path / "parts/best/model.safetensors").read_bytes() == (tmp_path / "whole/best/model.safetensors").read_bytes()


def test_the_error_of_one_group_is_that_of_its_values() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert over_groups(values, 4).standard_error == pytest.approx(values.std().item() / 2)
    assert over_groups(values, 2).standard_error == pytest.approx(1.0)  # of means 1.5 and 3.5


@pytest.mark.parametrize("measure", [["high", 0.1], [0.5, None]])
def test_a_look_whose_measures_are_no_numbers_is_left_out(measure: list[Any], tmp_path: Path) -> None:
    good = to_row(look_at(1, {"reward": torch.tensor([1.0, 2.0])}), None)
    bad = good | {"measures": {"reward": measure}}
    (tmp_path / "monitor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, bad)))
    assert len(read_looks(tmp_path)) == 1
