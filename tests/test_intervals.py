"What few seeds say: intervals against their definition, other libraries and a known truth."

import math

import numpy as np
import pytest
from scipy import stats

from fastsb.bench import intervals


def test_t_interval():
    xs = [81.2, 79.9, 80.4, 80.7, 81.0]
    mean, half = intervals.t_interval(xs)
    lo, hi = stats.t.interval(0.95, 4, np.mean(xs), stats.sem(xs))
    assert mean == pytest.approx(np.mean(xs)) and (mean - half, mean + half) == pytest.approx((lo, hi))
    assert (
        intervals.t_interval([1.0])[0] == 1
        and math.isnan(intervals.t_interval([1.0])[1])
        and math.isnan(intervals.t_interval([])[0])
    )


def test_budget_to_reach():
    f = intervals.budget_to_reach
    assert f([3, 6, 12], [70, 80, 85], 80) == pytest.approx(6)
    assert f([3, 6, 12], [70, 80, 85], 75) == pytest.approx(3 * 2**0.5)  # half of the way, in logarithms
    assert f([3, 6, 12], [70, 80, 85], 84) == pytest.approx(6 * 2**0.8)
    assert f([3, 6, 12], [70, 80, 85], 86) == math.inf and f([], [], 1) == math.inf
    assert f([3, 6, 12], [70, 80, 85], 60) == 0 and f([3, 6, 12], [70, 80, 85], 70) == 3
    assert f([3, 6, 12, 24], [70, 82, 78, 90], 80) == pytest.approx(3 * 2 ** (10 / 12))  # the first time


def test_pairs_leave_no_doubt():
    "Where a method is plain training plus a constant, however much the seeds differ"
    plain = np.array([0.2, 0.5, 0.9])
    acc = np.stack([plain - 0.05, plain + 0.05], 1)
    assert intervals.ratio_interval([3, 6], acc, 6, plain) == pytest.approx([3 * 2**0.5 / 6] * 3)
    r, lo, hi = intervals.ratio_interval([3, 6], acc[:1], 6, plain[:1])
    assert r == pytest.approx(2**-0.5) and math.isnan(lo) and math.isnan(hi)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_interval_is_what_paired_t_tests_do_not_contradict(n, level):
    "Against SciPy's test at each of many shares"
    rng, budgets = np.random.default_rng(n), np.array([3.0, 6, 12, 24])
    shares = np.exp(np.linspace(np.log(3 / 24), 0, 2001))
    opened = 0
    for _ in range(12):
        plain = 85 + 0.3 * rng.standard_normal(n)
        acc = np.array([80.0, 83, 86, 88]) + 0.4 * rng.standard_normal((n, 4))
        at = np.stack([np.interp(np.log(24 * shares), np.log(budgets), a) for a in acc])
        test = stats.ttest_rel(at, np.repeat(plain[:, None], len(shares), 1))
        inside = shares[test.pvalue >= 1 - level]
        _, lo, hi = intervals.ratio_interval(budgets, acc, 24, plain, level)
        opens_below = test.pvalue[0] >= 1 - level or test.statistic[0] > 0
        opens_above = test.pvalue[-1] >= 1 - level or test.statistic[-1] < 0
        assert lo == (0 if opens_below else pytest.approx(inside.min(), rel=2e-3))
        assert hi == (math.inf if opens_above else pytest.approx(inside.max(), rel=2e-3))
        opened += opens_below or opens_above
    assert opened < 12 or n == 2


def test_what_lies_outside_of_the_budgets():
    plain = np.array([80.0, 81, 82])
    acc = plain[:, None] + np.array([1.0, 3.0]) + np.array([[0.1, 0.2], [-0.1, 0], [0, -0.2]])
    assert intervals.ratio_interval([6, 12], acc, 12, plain) == (0, 0, 0)  # better at the first budget already
    assert intervals.ratio_interval([6, 12], acc, 12, plain + 9) == (math.inf,) * 3  # and nowhere as good
    unsure = plain[:, None] + np.array([-1.0, 1.0]) + np.array([[3.0, -3], [-3, 0], [0, 3]])
    assert intervals.ratio_interval([6, 12], unsure, 12, plain)[1:] == (0, math.inf)


@pytest.mark.parametrize("n", [3, 5])
def test_coverage(n):
    "Of 800 experiments with a known truth, 95 % of the intervals hold it: within 2.5 times the error of such a count"
    rng, budgets, mean = np.random.default_rng(10 + n), np.array([3, 6, 12, 24]), np.array([80.0, 84, 87, 89])
    share = 8.4 / 24
    target = np.interp(np.log(24 * share), np.log(budgets), mean)
    seed = 0.3 * rng.standard_normal((800, n))
    plain = target + seed + 0.2 * rng.standard_normal((800, n))
    acc = mean + seed[..., None] + 0.3 * rng.standard_normal((800, n, 4))
    ends = [intervals.ratio_interval(budgets, a, 24, p) for a, p in zip(acc, plain)]
    held = np.mean([lo <= share <= hi for _, lo, hi in ends])
    assert 0.93 <= held <= 0.975
    assert np.mean([hi < math.inf and lo > 0 for _, lo, hi in ends]) > 0.5  # they say something
