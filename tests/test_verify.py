"""`tiltflow verify` reaches known answers, and says when it does not."""

from __future__ import annotations

import math

import affine
import pytest
import torch

from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import ExactVelocity
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.plugins import find, names
from tiltflow.problems import Check, Findings, Problem, Trained, to_law
from tiltflow.problems.lqg import Lqg
from tiltflow.problems.verification.quadratic_tilt import temperature
from tiltflow.problems.verification.verify import read_verification, verify
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.batch import Drawn
from tiltflow.training.optimizer import fill_optimizer
from tiltflow.training.trainer import Record

SMALL = [
    "num_samples=4000",
    "num_samples_w2=500",
    "method.num_inference_steps=20",
    "num_inference_steps=20",
    "hidden=64",
    "layers=2",
]


def test_a_key_without_a_dot_finds_its_place() -> None:
    settings = read_verification(
        "mixture", "adjoint-matching", ["scale=0.3", "beta=2", "seed=4", "solver=ddpm", "sampling.solver=euler", "modes=5"]
    )
    assert (settings.problem.scale, settings.method.beta, settings.seed, settings.problem.modes) == (0.3, 2, 4, 5)  # type: ignore[union-attr]
    assert (settings.method.solver, settings.problem.sampling.solver) == ("ddpm", "euler")
    with pytest.raises(InputError, match="'bta' is not a setting, did you mean 'beta'"):
        read_verification("mixture", "adjoint-matching", ["bta=2"])
    with pytest.raises(InputError, match=r"linear has 3 numbers, dimension is 2$"):
        read_verification("gaussian", "adjoint-matching", ["linear=[1, 2, 3]"])


def test_a_preset_without_an_optimizer_of_its_own_keeps_that_of_the_problem() -> None:
    plain, preset = (read_verification("mixture", "tilt-matching", some) for some in ([], ["preset=implicit"]))
    assert preset.optimizer == plain.optimizer != read_verification("mixture", "adjoint-matching", ["preset=paper"]).optimizer
    published = read_verification("mixture", "adjoint-matching", ["preset=paper"])
    assert fill_optimizer(published.method, published.optimizer).learning_rate == 2e-5


def test_what_a_preset_is_about_is_not_tuned_by_a_problem() -> None:
    shares = [
        read_verification("mixture", "tilt-matching", some).method.target_effective_sample_size
        for some in ([], ["preset=implicit"], ["target_effective_sample_size=0"])
    ]
    assert shares == [0.25, 0.7, 0.0]


def test_a_linear_reward_on_a_gaussian_is_reached() -> None:
    settings = read_verification(
        "gaussian", "adjoint-matching", [*SMALL, "dimension=1", "iterations=150", "train_batch_size=128"]
    )
    result = verify(settings).values
    # the chain of 20 steps leaves 0.5 % in the variance (2.5e-3 in W2); the rest is the Monte-Carlo floor
    assert result["distance"] < result["floor"] + 3 * result["floor_std"] + 0.02
    assert result["distance"] < 0.1 * result["distance_base"]
    # the mean of this chain's optimum is 1.12668, not 1.125; the rest is 4 standard errors of 4,000 samples
    assert abs(result["reward"] - result["reward_exact"]) < 4 * result["reward_error"] + 1.7 * 0.00168
    assert result["control_error"] < 0.5  # it is 1 before training
    assert result["path_kl_exact"] == pytest.approx(1.7**2 * 0.25 / 2)  # (c s)^2 / 2
    assert result["path_kl"] == pytest.approx(result["path_kl_exact"], rel=0.1)


def test_without_training_the_report_shows_the_base() -> None:
    settings = read_verification("mixture", "adjoint-matching", [*SMALL, "iterations=1", "learning_rate=1e-9"])
    result = verify(settings).values
    assert result["distance"] == pytest.approx(result["distance_base"], rel=0.05)
    assert result["control_error"] == pytest.approx(1, abs=0.01)
    # the tilt moves the mean by more than one standard deviation of a mode
    assert result["distance"] > 20 * result["floor"]
    assert abs(result["achieved_tilt"]) < 0.01


def posed(*overrides: str) -> Findings:
    """What is found of a model that has the law which was asked for, at beta 0.7."""
    settings = read_verification("mixture", "adjoint-matching", ["beta=0.7", *overrides])
    problem, method = settings.problem, settings.method
    law = problem.exact_law(method, 1)
    record = Record(1, {"loss": 0.0, "path_kl": 0.0}, seconds=1.0, network_evaluations=1)
    flow = Flow(ExactVelocity(law))
    return problem.check(Trained(method, flow, problem.base_flow(), law, record, 1, 1, num_samples=2000, draws=2, seed=0))


@pytest.mark.parametrize(
    "overrides",
    [
        ["dimension=1", "means=[[0.3]]", "linear=-1.2"],
        ["dimension=3", "means=[[-1, 0, 1], [2, 1, 0]]", "weights=[3, 1]", "scale=[0.2, 0.9]", "linear=[-0.5, 0.2]"],
        ["dimension=5", "quadratic=0.4"],
    ],
)
def test_any_law_has_its_achieved_tilt_and_its_effective_sample_size(overrides: list[str]) -> None:
    found = posed("num_inference_steps=40", "num_samples_w2=100", *overrides)
    values = found.values
    assert abs(values["achieved_tilt"] - 1) < 4 * values["achieved_tilt_error"] + 0.01
    assert abs(values["achieved_tilt_r2"] - 1) < 4 * values["achieved_tilt_r2_error"] + 0.01
    assert values["effective_sample_size_of"] == "2000 base samples"
    assert 1 < values["effective_sample_size"] < 2000
    assert "R² " in str(found.tables[0].rows["achieved tilt"])
    assert abs(values["kl_to_target"]) < 4 * values["kl_to_target_error"] + 1e-3
    assert values["limits"] == []


@pytest.mark.parametrize(
    ("beta", "off", "told"), [(0.171, 1.0, False), (0.171, 1.2, True), (1.0, 1.2, False)], ids=["exact", "strong", "easy"]
)
def test_a_law_that_base_samples_cannot_check_is_checked_by_its_log_ratio(beta: float, off: float, told: bool) -> None:
    """The ring, and a model at a temperature that is `off`: at a tenth of the reward's spread no base sample resembles the law,
    at 1 they do, and tests can say it."""
    settings = read_verification("mixture", "tilt-matching", [f"beta={beta}", "num_samples_w2=100"])
    problem, method = settings.problem, settings.method
    law = problem.exact_law(method, 1)
    record = Record(1, {"loss": 0.0, "inverse_temperature": 1 / beta}, seconds=1.0, network_evaluations=1)
    flow = Flow(ExactVelocity(problem.base().tilt(problem.reward(), off * beta)))
    found = problem.check(Trained(method, flow, problem.base_flow(), law, record, 1, 1, num_samples=2000, draws=2, seed=0))
    assert [len(found.values["limits"]), "limit" in found.tables[0].rows] == [told, told]
    if told:
        assert "path-reweighted that begins with this method" in found.values["limits"][0]


def test_the_effective_sample_size_of_base_samples_is_that_of_their_law() -> None:
    """Under a linear reward c x a Gaussian's is exp(-(c s / beta)^2) of the samples."""
    size = posed("dimension=1", "means=[[0.3]]", "scale=0.5", "linear=1", "num_samples_w2=100").values["effective_sample_size"]
    assert size / 2000 == pytest.approx(math.exp(-((0.5 / 0.7) ** 2)), rel=0.1)


def test_many_dimensions_do_not_hide_that_the_base_is_untuned() -> None:
    """In 64 dimensions random directions see a tenth of the tilt, and the exact W2 is all floor; the span of the means and the
    reward is a plane, and shows it."""
    overrides = ["dimension=64", "iterations=1", "learning_rate=1e-9", "train_batch_size=8", "solver=ddpm", "hidden=8"]
    sizes = ["num_samples=2000", "num_samples_w2=300", "method.num_inference_steps=5", "num_inference_steps=20", "draws=4"]
    result = verify(read_verification("mixture", "adjoint-matching", [*overrides, *sizes, "sampling.solver=heun"])).values
    assert result["w2"] < 1.1 * result["w2_floor"]
    assert result["span"] == 2
    assert result["distance_span"] > 10 * result["floor_span"]
    assert result["distance_span"] > 5 * result["distance"]
    assert result["chain_optimum"] is None
    assert result["chain_optimum_missing"] == "not computed above two dimensions"


def test_samples_are_drawn_in_the_steps_that_were_asked_for_and_in_those_of_the_method() -> None:
    """An untuned N(0.7, 0.25 I) as its own target: W2 along the diagonal is the error of the sampler's mean and standard
    deviation, known step by step."""
    alone = ["dimension=3", "means=[[0.7, 0.7, 0.7]]", "scale=0.5", "linear=1e-3", "beta=1e9", "iterations=1", "draws=2"]
    sizes = ["num_samples=6000", "num_samples_w2=100", "train_batch_size=8", "hidden=8", "learning_rate=1e-12"]
    steps = ["method.num_inference_steps=3", "sampling.num_inference_steps=5"]
    found = verify(read_verification("mixture", "adjoint-matching", [*alone, *sizes, *steps])).values
    for values, count in ((found, 5), (found["own_steps"], 3)):
        chain = Sampling(num_inference_steps=count).chain()
        a = affine.slope(chain.times[:-1])
        gain, offset = chain.x_scale + chain.v_scale * a, chain.v_scale * affine.MEAN * (1 - a * chain.times[:-1])
        mean, variance = affine.Affine(gain, offset, chain.std).law()
        expected = torch.hypot(3**0.5 * (mean - 0.7), variance.sqrt() - 0.5).item()
        assert expected > 2 * found["floor_span"]
        assert values["distance_span"] == pytest.approx(expected, abs=found["floor_span"])
        assert values["distance_ode_span"] < expected - found["floor_span"]
    assert found["own_steps"]["num_inference_steps"] == 3


def test_the_best_that_a_chain_can_is_told_from_a_run_that_has_not_converged() -> None:
    two = ["dimension=1", "means=[[-1.5], [1.5]]", "weights=[3, 2]", f"scale=[{0.15**0.5}, {0.3**0.5}]", "linear=0.8"]
    overrides = [*two, "quadratic=0.7", "beta=0.6", "num_inference_steps=20", "method.num_inference_steps=15"]
    result = verify(
        read_verification("mixture", "adjoint-matching", [*overrides, *SMALL[:2], "iterations=1", "draws=2"])
    ).values
    best = result["chain_optimum"]
    assert best["num_inference_steps"] == 15  # of the chain that is tuned, not of the one that samples it
    assert (best["reward"], best["distance"]) == pytest.approx((0.2084, 0.2324), abs=2e-4)
    assert result["distance"] > 5 * best["distance"] > 15 * result["floor"]


@pytest.mark.slow
def test_the_ring_of_eight_gaussians_is_within_twice_the_floor() -> None:
    result = verify(read_verification("mixture", "adjoint-matching", ["iterations=1000"])).values
    assert result["distance"] <= 2 * result["floor"]
    assert result["reward_exact"] == pytest.approx(2.0887, abs=1e-4)


def test_any_mixture_can_be_posed() -> None:
    settings = read_verification(
        "mixture", "adjoint-matching", ["means=[[-1.5], [1.5, 0.5]]", "weights=[3, 2]", "scale=[0.5, 0.25]", "dimension=3"]
    )
    law = settings.problem.base()
    assert law.means.tolist() == [[-1.5, 0, 0], [1.5, 0.5, 0]]
    assert law.log_weights.exp().tolist() == pytest.approx([0.6, 0.4])
    assert law.variances.tolist() == [0.25, 0.0625]
    assert settings.problem.reward().linear.tolist() == [1, 0.5, 0]
    for wrong, message in (
        ("weights=[1]", "weights has 1 numbers for 8 modes"),
        ("dimension=1", "linear has 2 numbers by default, dimension is 1; set linear too$"),
        ("means=[[.nan, 1]]", r"means\.0\.0 must be a finite number \(got nan\)"),
        ("linear=.inf", r"linear must be a finite number \(got inf\)"),
        ("linear=1,.nan", r"linear\.1 must be a finite number \(got nan\)"),
    ):
        with pytest.raises(InputError, match=message):
            read_verification("mixture", "adjoint-matching", [wrong])


@pytest.mark.parametrize("name", names("problems"))
def test_a_problem_is_complete_and_starts_at_its_base(name: str) -> None:
    """Of every problem: the flow that is trained is the base before it is, and the usual method has a known law."""
    problem = read_verification(name).problem
    assert isinstance(problem, Problem)
    found = problem.draw(7, stream(0, "noise"))
    drawn = found if isinstance(found, Drawn) else Drawn(found)
    flows = problem.base_flow(), problem.tuned_flow(seed=0)
    assert [bool(list(flow.parameters())) for flow in flows] == [False, True]
    x, base, tuned = drawn.x, *map(drawn.bind, flows)
    for t in (0.3, 0.8):
        assert torch.equal(tuned(x, torch.tensor(t)), base(x, torch.tensor(t)))
    assert (drawn.reward or problem.reward())(x).shape == (7,)
    assert problem.exact_law(find("methods", problem.usual_method)(beta=0.5), 1) is not None


def test_a_check_says_a_number_beside_theory() -> None:
    assert str(Check(1.23456)) == "1.2346"
    assert str(Check(1.2, 0.1, 1.0)) == "1.2000 ± 0.1000   (exact 1.0000)"
    assert str(Check(0.5, note="floor 0.1", format=".1%")) == "50.0%   (floor 0.1)"
    assert str(to_law(0.3, 0.2)) == "0.3000   (1.50 x the Monte-Carlo floor)"
    assert Check(1.2, 0.1, 1.0).z == pytest.approx(2)
    with pytest.raises(ValueError, match="requires an exact value and a standard error"):
        _ = Check(1.2, 0.1).z


# ---- the linear-quadratic-Gaussian problem ----


def test_letters_of_the_lqg_problem_find_their_place() -> None:
    overrides = ["Q=2", "q=-0.3", "T=1.5", "K=0.1", "k=0.4", "lambda=0.25", "N=7", "eta=0.5", "variance=0.6"]
    settings = read_verification("lqg", "score-as-action", overrides)
    assert isinstance(settings.problem, Lqg)
    problem, method = settings.problem, settings.method
    assert (problem.Q, problem.q, problem.T, problem.K, problem.k) == (2, -0.3, 1.5, 0.1, 0.4)
    assert (method.beta, method.num_inference_steps, method.solver) == (0.25, 7, "euler-maruyama")
    assert (problem.eta, problem.variance) == (0.5, 0.6)
    assert method.eta == 0.5  # the sampler of the method is that of the problem
    with pytest.raises(InputError, match="'lamda' is not a setting, did you mean 'lambda'"):
        read_verification("lqg", "score-as-action", ["lamda=1"])


def test_verify_lqg_reports_what_is_known() -> None:
    overrides = ["N=5", "iterations=40", "trajectories=4000", "num_samples=2000", "evaluate_steps=[5, 20]"]
    settings = read_verification("lqg", "score-as-action", overrides)
    result = verify(settings).values
    assert result["policy"]["objective"] == pytest.approx(-1.1051919302489641, abs=1e-9)
    assert result["policy"]["objective_of_chain"] == pytest.approx(-1.170981, abs=1e-6)
    assert result["objective_continuous"] == pytest.approx(-0.1911624249, abs=1e-9)
    assert result["optimum"]["terminal_mean"] == pytest.approx(0.3726855916, abs=1e-9)
    for name in ("return", "return-minus-value", "temporal-difference", "pathwise"):
        assert max(map(abs, result["gradients"][name]["z"])) < 3.5
    assert result["objective_base"] < result["objective"] <= result["objective_exact"]
    assert result["at_other_steps"]["5"]["objective"] == result["objective"]
    assert result["distance"] < result["distance_base"]
    assert result["control_error"] < 1


@pytest.mark.slow
def test_adjoint_matching_solves_lqg_too() -> None:
    settings = read_verification("lqg", "adjoint-matching", ["N=10", "iterations=300", "num_samples=2000"])
    result = verify(settings).values
    assert result["gradients"] is None
    assert result["objective"] == pytest.approx(result["objective_exact"], rel=0.02)


@pytest.mark.slow
def test_training_reaches_the_optimum_at_every_number_of_steps() -> None:
    """Within 1 %, with the same settings; and a policy trained at 10 steps loses less than 2 % at 100 to one trained there."""
    at_100 = {}
    for steps in (5, 10, 50, 100):
        overrides = [f"N={steps}", "trajectories=2", "num_samples=200", "evaluate_steps=[100]"]
        rows = verify(read_verification("lqg", "score-as-action", overrides)).values["at_other_steps"]
        here = rows[str(steps)]
        assert here["objective"] > here["optimum"] - 0.01 * abs(here["optimum"])
        at_100[steps] = rows["100"]["objective"]
    assert at_100[10] > at_100[100] - 0.02 * abs(at_100[100])


@pytest.mark.slow
def test_score_as_action_reaches_the_mixture_without_a_gradient() -> None:
    result = verify(read_verification("mixture", "score-as-action", ["iterations=1000"])).values
    assert result["distance"] <= 3 * result["floor"]
    assert result["distance_ode"] <= 3 * result["floor"]


def test_the_temperature_of_rounds_without_a_penalty() -> None:
    """After 25 steps of 10 a round the law is p_base exp(3 tau r)."""
    assert temperature(OrwCfmW2(alpha=0, tau=0.5, num_passes=10), 25) == pytest.approx(1 / 1.5)
    assert temperature(AdjointMatching(beta=0.3), 25) == 0.3
    for settings in ({"alpha": 0.5}, {"alpha": 0.0, "online_fraction": 0.5}, {"alpha": 0.0, "weight": "reward"}):
        with pytest.raises(InputError, match="known for alpha = 0, online_fraction = 1 and exponential weights"):
            temperature(OrwCfmW2.model_validate(settings), 25)
