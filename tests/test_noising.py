"""Noising: the law of what conditional flow matching regresses on, and the weights of earlier times."""

from __future__ import annotations

import pytest
import torch
from scipy.integrate import quad

from tiltflow import processes
from tiltflow.flows.field import FunctionField
from tiltflow.optimization import StoredWeights
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.batch import Batch
from tiltflow.training.noising import Points, noising, posterior, resampled, shuffled, smoothed

FIELD = FunctionField(lambda x, t: x)


def drawn(size: int, *, start: float = 0.0, shift: float = 1.0, seed: int = 0):
    samples = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(solver="heun", num_inference_steps=4, shift=shift)
    return samples, noising(FIELD, samples, shuffled(2, size, generator), sampling, generator, start=start)


def test_points_are_on_the_path_from_the_noise_to_the_sample_at_their_time():
    samples, pairs = drawn(1000)
    points = pairs.points(slice(200, 700))
    end = points.x + (1 - points.t)[:, None] * points.u
    start = points.x - points.t[:, None] * points.u
    torch.testing.assert_close(end, samples[points.which])
    torch.testing.assert_close(start, pairs.noise[200:700])


def test_noise_is_standard_normal_and_independent_of_the_sample_and_of_the_time():
    _, pairs = drawn(100_000)
    noise = pairs.noise[:, 0]
    assert abs(noise.mean()) < 4 / 100_000**0.5
    assert abs(noise.square().mean() - 1) < 4 * 2**0.5 / 100_000**0.5
    for other in (pairs.which.double(), pairs.times):
        assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 4 / 100_000**0.5


def test_times_fill_each_part_of_the_axis_from_the_start_of_the_sampler():
    _, pairs = drawn(500, start=0.2)
    u = (pairs.times - 0.2) / 0.8
    assert torch.equal((u * 500).floor().long(), torch.arange(500))
    _, pairs = drawn(500, shift=3.0)
    noise = 1 - (torch.arange(500) + 0.5) / 500
    middle = 1 - 3 * noise / (1 + 2 * noise)
    assert (pairs.times - middle).abs().max() < 3 / 500


def test_the_weights_of_the_kl_are_those_of_girsanov():
    """N(0, 1) shifted by 1: |v - v_base|^2 = ((1 - t) / V)^2, V = t^2 + (1 - t)^2, and the KL of all times is 1/2, however they
    are spread; up to the last time that the sampler asks for."""
    for start, shift, last in ((0.0, 1.0, 3 / 4), (0.0, 3.0, 1 / 2), (0.3, 0.5, 0.3 + 0.7 * 6 / 7)):
        _, pairs = drawn(2000, start=start, shift=shift)
        t = pairs.times
        found = (pairs.kl_weights * ((1 - t) / (t**2 + (1 - t) ** 2)) ** 2).mean().item()
        exact, _ = quad(lambda t: t * (1 - t) / (t**2 + (1 - t) ** 2) ** 2, start, last)
        assert abs(found - exact) < 2e-3
        assert (pairs.kl_weights[t > last] == 0).all()
    assert quad(lambda t: t * (1 - t) / (t**2 + (1 - t) ** 2) ** 2, 0, 1)[0] == pytest.approx(0.5)


def test_every_sample_is_there_once_before_any_is_there_twice():
    which = shuffled(7, 17, torch.Generator().manual_seed(0))
    assert sorted(which[:7].tolist()) == sorted(which[7:14].tolist()) == list(range(7))
    assert len(which) == 17
    assert len(set(which[14:].tolist())) == 3


def test_a_flow_at_earlier_weights_leaves_the_present_ones_and_their_gradients_alone():
    scale = torch.nn.Parameter(torch.tensor(2.0))
    field = FunctionField(lambda x, t: scale * x)
    batch = Batch(torch.ones(1, 1), field, field, lambda x: x[:, 0], torch.Generator(), parameters=[scale])
    before = batch.copy_of_weights()
    with torch.no_grad():
        scale.fill_(5.0)
    x, t = torch.ones(1, 1), torch.tensor(0.5)
    present = batch.tuned(x, t)
    assert batch.tuned_at(before)(x, t).item() == 2
    assert scale.item() == 5
    present.sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == 1
    assert [value.item() for value in before] == [2]


def test_stored_weights_can_be_made_the_present_ones():
    scale = torch.nn.Parameter(torch.tensor(2.0))
    stored = StoredWeights([scale])
    with torch.no_grad():
        scale.fill_(5.0)
    stored.store()
    assert scale.item() == 2


def test_the_posterior_is_bayes_rule_for_the_end_of_a_path():
    samples = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    pairs = noising(FIELD, samples, torch.arange(3).repeat(2), Sampling(), generator)
    points = pairs.points(pairs.own)
    t = points.t[:, None]
    law = torch.distributions.Normal(t[..., None] * samples, (1 - t[..., None]).expand(-1, 3, 2))
    joint = law.log_prob(points.x[:, None]).sum(2)
    torch.testing.assert_close(posterior(points, samples, [torch.arange(3)]), joint.softmax(1))


def test_the_mean_over_the_posterior_is_the_velocity_of_the_samples_law_and_keeps_the_mean_of_the_regression():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    count = 200_000
    which = torch.randint(50, (count,), generator=generator)
    x0 = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    t = torch.full((count,), 0.4, dtype=torch.float64)
    points = Points(which, 0.6 * x0 + 0.4 * samples[which], t, samples[which] - x0)
    some = Points(*(each[:2000] for each in points))
    p = posterior(some, samples, [torch.arange(50)])
    smooth = torch.cos(points.x[:, 0])  # any function of x_t: both targets have the same mean beside it
    plain = weights[which] * points.u[:, 0] * smooth
    known = (p * weights) @ samples - (p @ weights)[:, None] * some.x
    averaged = known[:, 0] / 0.6 * smooth[:2000]
    error = (plain.var() / count + averaged.var() / 2000) ** 0.5
    assert abs(plain.mean() - averaged.mean()) < 4 * error
    assert averaged.var() < plain.var() / 3


def test_near_the_data_a_path_knows_its_own_sample():
    samples = torch.randn(30, 784, generator=torch.Generator().manual_seed(0))
    which = torch.arange(30)
    for t in (0.9, 1 - 1e-9, 1.0):
        points = Points(which, t * samples + (1 - t) * torch.randn(30, 784), torch.full((30,), t).double(), samples)
        torch.testing.assert_close(posterior(points, samples, [which]), torch.eye(30, dtype=torch.float64))


def test_a_path_ends_in_a_sample_of_its_own_condition():
    samples, pairs = drawn(200)
    points = pairs.points(pairs.own)
    p = posterior(points, samples, [torch.tensor([0]), torch.tensor([1])])
    torch.testing.assert_close(p, torch.nn.functional.one_hot(points.which, 2).double())


def pairs_of(count: int, seed: int, labels: torch.Tensor | None = None):
    samples = torch.tensor([[-1.0, 0.5], [0.3, -0.2], [2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(4, (count,), generator=generator)
    pairs = noising(FIELD, samples, which, Sampling(solver="heun"), generator)
    return samples, pairs, torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)[which]


def test_means_among_neighbours_are_those_of_the_posterior():
    samples, pairs, gain = pairs_of(64, 0)
    groups = torch.arange(64) % 2
    values = torch.stack([gain, gain**2], 1)
    found = smoothed(pairs, values, gain, groups, 16)
    points = pairs.points(pairs.own)
    order = [*range(0, 64, 2), *range(1, 64, 2)]  # conditions one after another, in parts of 16
    for begin in range(0, 64, 16):
        some = order[begin : begin + 16]
        for i in some:
            t = points.t[i]
            p = torch.tensor([(-(points.x[i] - t * samples[pairs.which[j]]).square().sum() / 2 / (1 - t) ** 2) for j in some])
            p = p.double().softmax(0)
            u = torch.stack([(samples[pairs.which[j]] - points.x[i]) / (1 - t) for j in some])
            torch.testing.assert_close(found.values[i], p @ values[some])
            torch.testing.assert_close(found.pull[i], (p * gain[some]) @ u)
    alone = smoothed(pairs, values, gain, groups, 1)
    torch.testing.assert_close(alone.pull, gain[:, None] * points.u)
    assert torch.equal(alone.values, values)


def test_neighbours_of_another_condition_are_not_seen():
    """In one part of all pairs as well."""
    _, pairs, gain = pairs_of(12, 1)
    groups = torch.tensor([0, 1, 2] * 4)
    together = smoothed(pairs, gain[:, None], gain, groups, 12)
    apart = smoothed(pairs, gain[:, None], gain, groups, 4)
    torch.testing.assert_close(together.pull, apart.pull)
    torch.testing.assert_close(together.values, apart.values)


def test_processes_have_the_noise_and_the_means_of_their_own_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 pairs of two conditions, among neighbours that are other processes': together what one process has, some of it
    twice where 10 cannot be shared evenly, and no memory of the rest."""
    _, whole, gain = pairs_of(10, 2)
    groups, values = torch.arange(10) % 2, torch.stack([gain, gain**2], 1)
    alone, points = [smoothed(whole, values, gain, groups, size) for size in (1, 4)], whole.points(slice(0, 10))
    for count in (2, 4):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        seen = set[int]()
        for index in range(count):
            monkeypatch.setattr(processes, "index", lambda index=index: index)
            _, pairs, _ = pairs_of(10, 2)
            own = range(10)[pairs.own]
            seen |= set(own)
            assert len(own) == len(pairs.noise) == {2: 5, 4: 3}[count]
            assert pairs.noise.untyped_storage().nbytes() == 8 * pairs.noise.numel()
            torch.testing.assert_close(pairs.noise, whole.noise[pairs.own], rtol=0, atol=0)
            inner = slice(pairs.own.start + 1, pairs.own.stop - 1)
            torch.testing.assert_close(tuple(pairs.points(inner)), tuple(each[inner] for each in points), rtol=0, atol=0)
            for size, expected in zip((1, 4), alone, strict=True):
                found = smoothed(pairs, values, gain, groups, size)
                assert found.pull.shape == (len(own), 2)
                for i in own:
                    part, same = found.part(slice(i, i + 1)), expected.part(slice(i, i + 1))
                    torch.testing.assert_close(tuple(part.points), tuple(same.points), rtol=0, atol=0)
                    torch.testing.assert_close(part[1:3], same[1:3], rtol=1e-12, atol=1e-12)
        assert seen == set(range(10))


def test_neighbours_leave_the_mean_of_the_gradient_and_most_of_its_noise_out():
    """sum f(x_t) gain u, for a test function of x and t: early, and at all times."""
    totals = []
    for seed in range(300):
        _, pairs, gain = pairs_of(32, seed)
        x, t = pairs.points(pairs.own)[1:3]
        test = torch.stack([x.tanh().sum(1), (t < 0.3) * x[:, 0]])
        groups = torch.zeros(32, dtype=torch.long)
        totals.append([(test @ smoothed(pairs, gain[:, None], gain, groups, size).pull).flatten() / 32 for size in (1, 32)])
    alone, among = (torch.stack(each) for each in zip(*totals, strict=True))
    difference = alone - among
    assert (difference.mean(0).abs() < 3.5 * difference.std(0) / 300**0.5).all()
    assert (among.var(0) < alone.var(0)).all()
    assert (among.var(0)[2:] < 0.4 * alone.var(0)[2:]).all()


def test_samples_are_drawn_as_often_as_their_weights_say() -> None:
    weights = torch.tensor([1.0, 0.0, 4.0, 2.5, 0.5])  # of sum 8, in any unit
    for seed in range(20):
        which = resampled(weights, 800, torch.Generator().manual_seed(seed))
        counts = torch.bincount(which, minlength=5).double()
        assert bool(((counts - 100 * weights).abs() < 1).all())
    assert not torch.equal(which, which.sort().values)
