import numpy as np
import pytest

from ess_rl.errors import UsageError
from experiments.statistics import (
    bootstrap_interval,
    bootstrap_interval_of_two,
    iqm,
    iqm_over_runs,
    mean,
    median,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    rank_correlation,
    score_matrix,
)

TWO_TASKS = np.array([[0.0, 10.0], [1.0, 20.0], [2.0, 3.0], [0.0, 4.0]])  # [4 runs, 2 tasks]


def test_iqm_by_hand() -> None:
    # Ten scores: two go at either end, the mean of 3 .. 8 is 5.5, whatever the outliers are.
    assert iqm(np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 1000]]).T) == 5.5
    # Three scores: floor(3 / 4) = 0, nothing goes.
    assert iqm(np.array([[1.0], [2.0], [6.0]])) == 3.0
    # All runs x tasks together: sorted 0 0 1 2 3 4 10 20, two go at either end, (1 + 2 + 3 + 4) / 4.
    assert iqm(TWO_TASKS) == 2.5
    # Each task apart: 0 and 1 remain of the first, 4 and 10 of the second.
    assert iqm_over_runs(TWO_TASKS).tolist() == [0.5, 7.0]


def test_mean_median_and_gap_by_hand() -> None:
    assert mean(TWO_TASKS) == 5.0  # 40 / 8
    three = np.array([[0.0, 4.0, 9.0], [2.0, 6.0, 9.0]])
    assert median(three) == 5.0  # of the tasks' means 1, 5, 9
    # Below 1: 1.0 and 0.5 missing; 3 counts as 1; (1.0 + 0.5 + 0 + 0) / 4.
    assert optimality_gap(np.array([[0.0, 0.5], [1.0, 3.0]])) == 0.375
    assert optimality_gap(np.array([[-1.0]]), target=2.0) == 3.0


def test_rank_correlation_by_hand() -> None:
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1)) = 0.6, whatever the distances.
    assert rank_correlation(np.array([1.0, 5.0, 6.0, 90.0]), np.array([0.2, 0.1, 7.0, 3.0])) == pytest.approx(0.6)
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([9.0, 4.0, 1.0])) == pytest.approx(-1.0)
    # Ranks 1.5 1.5 3 against 1 2 3, less their means: -0.5 -0.5 1 and -1 0 1; 1.5 / sqrt(1.5 * 2).
    assert rank_correlation(np.array([4.0, 4.0, 8.0]), np.arange(3.0)) == pytest.approx(1.5 / 3.0**0.5)
    assert rank_correlation(np.ones(3), np.arange(3.0)) == 0.0


def test_performance_profile_by_hand() -> None:
    profile = performance_profile(TWO_TASKS, [-1.0, 0.0, 3.0, 20.0])
    assert profile.tolist() == [1.0, 6 / 8, 3 / 8, 0.0]  # strictly above: the two zeros and the 3 are not


def test_probability_of_improvement_by_hand() -> None:
    x, y = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [0.0]])
    # Pairs against 2: lost, tied, won; against 0: won three times. (0 + 0.5 + 1 + 3) / 6.
    assert probability_of_improvement(x, y) == 0.75
    assert probability_of_improvement(y, x) == 0.25
    assert probability_of_improvement(x, x) == 0.5
    # Two tasks: 0.75 and 0 (all lost) average to 0.375, however far the losses go.
    assert probability_of_improvement(np.hstack([x, x]), np.hstack([y, y + 1e9])) == 0.375
    with pytest.raises(UsageError, match="1 and 2 tasks"):
        probability_of_improvement(x, np.hstack([y, y]))


def test_estimators_take_leading_axes() -> None:
    scores = np.random.default_rng(0).normal(size=(7, 5, 3))
    for estimator in (iqm, mean, median, optimality_gap, lambda x: performance_profile(x, [0.0, 0.5])):
        one_by_one = np.array([estimator(x) for x in scores])
        np.testing.assert_allclose(estimator(scores), one_by_one, rtol=1e-12)
    other = np.random.default_rng(1).normal(size=(7, 4, 3))
    one_by_one = [probability_of_improvement(x, y) for x, y in zip(scores, other, strict=True)]
    np.testing.assert_allclose(probability_of_improvement(scores, other), one_by_one, rtol=1e-12)


def test_interval_of_the_mean_agrees_with_the_normal_one() -> None:
    scores = np.random.default_rng(0).normal(size=(400, 1))
    low, high = bootstrap_interval(scores, mean, np.random.default_rng(1))
    standard_error = scores.std(ddof=1) / np.sqrt(400)
    assert low == pytest.approx(scores.mean() - 1.96 * standard_error, abs=0.2 * standard_error)
    assert high == pytest.approx(scores.mean() + 1.96 * standard_error, abs=0.2 * standard_error)


def test_interval_of_two_samples_agrees_with_the_normal_one() -> None:
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(300, 1)), draws.normal(size=(200, 1))
    low, high = bootstrap_interval_of_two(x, y, lambda a, b: mean(a) - mean(b), np.random.default_rng(1))
    standard_error = np.sqrt(x.var(ddof=1) / 300 + y.var(ddof=1) / 200)
    assert low == pytest.approx(x.mean() - y.mean() - 1.96 * standard_error, abs=0.2 * standard_error)
    assert high == pytest.approx(x.mean() - y.mean() + 1.96 * standard_error, abs=0.2 * standard_error)


def test_interval_is_stratified_and_takes_its_generator() -> None:
    # Tasks of very different scale, no spread within a task: resampling within tasks cannot move the mean.
    scores = np.array([[0.0, 1000.0]] * 5)
    assert bootstrap_interval(scores, mean, np.random.default_rng(0)) == (500.0, 500.0)
    # Seeds of each task are drawn apart: both zeros can come together, and both ones, though no seed has both.
    assert bootstrap_interval(np.array([[0.0, 1.0], [1.0, 0.0]]), mean, np.random.default_rng(0)) == (0.0, 1.0)
    scores = np.random.default_rng(0).normal(size=(10, 2))
    first, again, other = (bootstrap_interval(scores, iqm, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_interval_of_a_vector_is_that_of_each_number() -> None:
    scores = np.random.default_rng(0).normal(size=(8, 3))
    low, high = bootstrap_interval(scores, iqm_over_runs, np.random.default_rng(0), resamples=250)
    assert low.shape == high.shape == (3,)
    assert (low < iqm_over_runs(scores)).all() and (iqm_over_runs(scores) < high).all()
    # Each column is resampled on its own: its interval is about the one it has alone.
    alone = bootstrap_interval(scores[:, :1], iqm, np.random.default_rng(1))
    assert low[0] == pytest.approx(alone.low, abs=0.2) and high[0] == pytest.approx(alone.high, abs=0.2)


def test_one_run_gets_no_interval() -> None:
    one, two = np.array([[1.0, 2.0]]), np.array([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(UsageError, match="at least two runs"):
        bootstrap_interval(one, iqm, np.random.default_rng(0))
    with pytest.raises(UsageError, match="at least two runs"):
        bootstrap_interval_of_two(two, one, probability_of_improvement, np.random.default_rng(0))


@pytest.mark.parametrize("bad", [[], [[]], [1.0, 2.0], [[1.0, 2.0], [3.0]], [[1.0, None]], [[float("nan")]]])
def test_bad_scores_are_refused(bad: list) -> None:
    with pytest.raises(UsageError, match="score"):
        score_matrix(bad)


def test_agrees_with_rliable() -> None:
    library = pytest.importorskip("rliable.library", reason="rliable is not installed: its definitions are not checked")
    metrics = pytest.importorskip("rliable.metrics")
    draws = np.random.default_rng(0)
    x, y = draws.normal(1.0, 1.0, size=(11, 4)), draws.normal(0.5, 1.0, size=(7, 4)).round(1)
    x[:5] = x[:5].round(1)  # ties between the two as well
    assert iqm(x) == pytest.approx(metrics.aggregate_iqm(x), rel=1e-12)
    assert mean(x) == pytest.approx(metrics.aggregate_mean(x), rel=1e-12)
    assert median(x) == pytest.approx(metrics.aggregate_median(x), rel=1e-12)
    assert optimality_gap(x) == pytest.approx(metrics.aggregate_optimality_gap(x), rel=1e-12)
    assert probability_of_improvement(x, y) == pytest.approx(metrics.probability_of_improvement(x, y), rel=1e-12)
    thresholds = np.linspace(-1.0, 3.0, 17)
    theirs, their_intervals = library.create_performance_profile({"x": x}, thresholds, reps=500)
    np.testing.assert_allclose(performance_profile(x, thresholds), theirs["x"], rtol=1e-12)

    # Intervals differ by the draws alone: their ends are near, measured in the interval's width.
    def profile(scores: np.ndarray) -> np.ndarray:
        return performance_profile(scores, thresholds)

    ours = bootstrap_interval(x, profile, np.random.default_rng(0))
    np.testing.assert_allclose(np.array(ours), their_intervals["x"], atol=0.06)
    _, interval = library.get_interval_estimates({"x": x}, lambda s: np.array([metrics.aggregate_iqm(s)]), reps=500)
    ours = bootstrap_interval(x, iqm, np.random.default_rng(0))
    np.testing.assert_allclose(np.array(ours), interval["x"][:, 0], atol=0.15 * float(ours.high - ours.low))
    _, interval = library.get_interval_estimates(
        {"x,y": (x, y)}, lambda a, b: np.array([metrics.probability_of_improvement(a, b)]), reps=500
    )
    ours = bootstrap_interval_of_two(x, y, probability_of_improvement, np.random.default_rng(0))
    np.testing.assert_allclose(np.array(ours), interval["x,y"][:, 0], atol=0.15 * float(ours.high - ours.low))
