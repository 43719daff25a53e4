"""Draws: the reference sequence of SplitMix64, the properties of the distributions, and independence of neighbors."""

import math

import pytest
import torch

from ess_rl import random

N = 100_000


def kolmogorov_smirnov(cdf_of_draws: torch.Tensor) -> float:
    """sqrt(n) times the greatest distance of the empirical from the true distribution; above 1.95 once in 1000."""
    n = cdf_of_draws.numel()
    ordered = cdf_of_draws.double().flatten().sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1.0 + torch.erf(x.double() / math.sqrt(2.0)))


def test_bits_are_splitmix64():
    # The first outputs of the reference implementation (S. Vigna, splitmix64.c) from state 1234567.
    drawn = random.bits(torch.tensor(1234567), (3,))
    assert [x % 2**64 for x in drawn.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform(dtype: torch.dtype):
    x = random.uniform(torch.tensor(3), (N,), dtype)
    assert x.dtype == dtype
    assert x.min() >= 0.0
    assert x.max() < 1.0
    # Five standard errors: sqrt(1/12/n) of the mean, sqrt(1/180/n) of the variance.
    assert abs(x.double().mean() - 0.5) < 5.0 * math.sqrt(1.0 / 12.0 / N)
    assert abs(x.double().var() - 1.0 / 12.0) < 5.0 * math.sqrt(1.0 / 180.0 / N)
    assert kolmogorov_smirnov(x) < 1.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_is_normal(dtype: torch.dtype):
    x = random.normal(torch.tensor(4), (N,), dtype)
    assert x.dtype == dtype
    assert torch.isfinite(x).all()
    # Five standard errors of the first four moments: their variances are 1, 2, 15 and 96 over n.
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(x.double().pow(power).mean() - moment) < 5.0 * math.sqrt(variance / N)
    assert kolmogorov_smirnov(normal_cdf(x)) < 1.95


def test_the_two_numbers_of_a_box_muller_pair_are_independent():
    cosine, sine = random.normal(torch.tensor(5), (N,)).double().chunk(2)
    for x, y in ((cosine, sine), (cosine.square() - 1.0, sine.square() - 1.0)):
        correlation = (x * y).mean() / (x.std() * y.std())
        assert abs(correlation) < 5.0 / math.sqrt(N / 2)


def test_odd_counts_and_shapes():
    seeds = torch.arange(6).reshape(2, 3)
    assert random.bits(seeds, ()).shape == (2, 3)
    assert random.uniform(seeds, (4,)).shape == (2, 3, 4)
    assert random.normal(seeds, (5, 3)).shape == (2, 3, 5, 3)
    assert random.normal(torch.tensor(0), (1,)).shape == (1,)
    assert random.permutation(seeds, 7).shape == (2, 3, 7)


@pytest.mark.parametrize(
    "draw",
    [
        lambda s: random.uniform(s, (4, 2)),
        lambda s: random.normal(s, (5,)),
        lambda s: random.permutation(s, 9),
        lambda s: random.fold_in(s, 3),
    ],
)
def test_a_draw_does_not_depend_on_its_neighbors(draw):
    seeds = torch.tensor([12, -5, 7])
    together, by_vmap = draw(seeds), torch.func.vmap(draw)(seeds)
    assert torch.equal(together, by_vmap)
    for i in range(3):
        assert torch.equal(together[i], draw(seeds[i]))


def test_streams_of_neighboring_seeds_are_uncorrelated():
    x = random.normal(torch.arange(20), (10_000,)).double()
    correlation = torch.corrcoef(x) - torch.eye(20)
    assert correlation.abs().max() < 5.0 / math.sqrt(10_000)


def test_permutation_is_one_and_each_is_as_likely():
    order = random.permutation(torch.tensor(8), 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    # 24 orders of four, 24000 draws: chi^2 with 23 degrees of freedom stays below 49.7 except once in 1000.
    orders = random.permutation(torch.arange(24_000), 4)
    count = (orders * torch.tensor([64, 16, 4, 1])).sum(-1).bincount()
    count = count[count > 0].double()
    assert count.numel() == 24
    assert ((count - 1000.0).square() / 1000.0).sum() < 49.7


def test_fold_in_makes_streams_that_differ():
    seeds, numbers = torch.arange(-50, 50), torch.arange(100)
    folded = random.fold_in(seeds[:, None], numbers)
    assert folded.unique().numel() == 10_000
    assert torch.equal(folded[:, 7], random.fold_in(seeds, 7))
    assert not torch.isin(folded, random.bits(seeds, (100,))).any()  # nor do they occur in the seed's own stream
    seed = torch.tensor(1)
    assert random.fold_in(random.fold_in(seed, 1), 2) != random.fold_in(random.fold_in(seed, 2), 1)
    assert kolmogorov_smirnov(random.uniform(folded.flatten(), (1,))) < 1.95


def test_weighted_permutation_draws_by_weight():
    """With weights 1, 2, 5 and 0, the first draw has probabilities 1/8, 2/8, 5/8; after the 5, the rest 1/3, 2/3."""
    count = 40_000
    order = random.weighted_permutation(torch.arange(count), torch.tensor([1.0, 2.0, 5.0, 0.0]).expand(count, 4))
    assert (order.sort(-1).values == torch.arange(4)).all()
    assert (order[:, 3] == 3).all()
    first = torch.bincount(order[:, 0], minlength=4) / count
    torch.testing.assert_close(first, torch.tensor([0.125, 0.25, 0.625, 0.0]), rtol=0.0, atol=5 * 0.5 / count**0.5)
    second = order[order[:, 0] == 2, 1]
    share = (second == 1).float().mean()
    assert abs(share - 2 / 3) < 5 * 0.5 / len(second) ** 0.5


def test_poisson_has_its_mean_its_variance_and_its_zeros():
    count = 40_000
    for mean in (0.0, 0.3, 2.0, 20.0):
        draws = random.poisson(torch.arange(count), torch.tensor(mean)).double()
        assert abs(draws.mean() - mean) <= 5 * (mean / count) ** 0.5
        # The fourth central moment is mean + 3 mean^2, so the variance of the sample variance is (mean + 2 mean^2) / n.
        assert abs(draws.var() - mean) <= 5 * ((mean + 2 * mean**2) / count) ** 0.5
        zeros = math.exp(-mean)
        assert abs((draws == 0).double().mean() - zeros) <= 5 * (zeros * (1 - zeros) / count) ** 0.5
    each = random.poisson(torch.arange(3), torch.tensor([0.0, 1.0, 20.0]))
    assert each.dtype == torch.int64 and each[0] == 0 and each[2] > 3


def test_categorical_draws_by_weight_and_with_replacement():
    count = 40_000
    weight = torch.tensor([[0.0, 1.0, 2.0, 0.0, 5.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    drawn = random.categorical(torch.tensor([1, 2]), weight, count)
    assert drawn.shape == (2, count) and (drawn[1] == 0).all()
    shares = torch.bincount(drawn[0], minlength=6) / count
    expected = weight[0] / 8.0
    torch.testing.assert_close(shares, expected, rtol=0.0, atol=5 * 0.5 / count**0.5)
    assert (shares[expected == 0.0] == 0.0).all()
