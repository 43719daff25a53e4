import numpy as np
import pytest

from ess_rl.errors import UsageError
from experiments.statistics import bootstrap_interval, iqm


def test_iqm_by_hand() -> None:
    # Ten scores: two go at either end, the mean of 3 .. 8 is 5.5, whatever the outliers are.
    assert iqm(np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 1000]]).T) == 5.5
    # Three scores: floor(3 / 4) = 0, nothing goes.
    assert iqm(np.array([[1.0], [2.0], [6.0]])) == 3.0
    # All runs x tasks together: sorted 0 0 1 2 3 4 10 20, two go at either end, (1 + 2 + 3 + 4) / 4.
    assert iqm(np.array([[0, 10], [1, 20], [2, 3], [0, 4]])) == 2.5


def test_interval_of_the_mean_agrees_with_the_normal_one() -> None:
    scores = np.random.default_rng(0).normal(size=(400, 1))
    low, high = bootstrap_interval(scores, lambda x: float(x.mean()), np.random.default_rng(1))
    standard_error = scores.std(ddof=1) / np.sqrt(400)
    assert low == pytest.approx(scores.mean() - 1.96 * standard_error, abs=0.2 * standard_error)
    assert high == pytest.approx(scores.mean() + 1.96 * standard_error, abs=0.2 * standard_error)


def test_interval_is_stratified_and_takes_its_generator() -> None:
    # Tasks of very different scale, no spread within a task: resampling within tasks cannot move the mean.
    scores = np.array([[0.0, 1000.0]] * 5)
    assert bootstrap_interval(scores, lambda x: float(x.mean()), np.random.default_rng(0)) == (500.0, 500.0)
    scores = np.random.default_rng(0).normal(size=(10, 2))
    first, again, other = (bootstrap_interval(scores, iqm, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_one_run_gets_no_interval() -> None:
    with pytest.raises(UsageError, match="at least two runs"):
        bootstrap_interval(np.array([[1.0, 2.0]]), iqm, np.random.default_rng(0))
