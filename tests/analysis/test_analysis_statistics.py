"""Statistics against scipy, hand-computed examples and simulation."""

from itertools import combinations

import numpy as np
import pytest
from scipy import integrate, stats

from analysis import statistics

inf, nan = np.inf, np.nan


def test_comparison_equals_scipy():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(1.0, 0.1, 8), rng.normal(1.05, 0.1, 8)
    result = statistics.compare(ours, theirs, margin=0.02)
    assert result.p_worse == pytest.approx(stats.ttest_rel(ours, theirs + 0.02, alternative="greater").pvalue)
    assert result.p_better == pytest.approx(stats.ttest_rel(ours, theirs, alternative="less").pvalue)
    assert result.difference == pytest.approx((ours - theirs).mean())
    interval = stats.bootstrap(
        (ours, theirs), lambda x, y, axis: (x - y).mean(axis=axis), paired=True, method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert (result.low, result.high) == pytest.approx(tuple(interval), abs=0.004)
    assert result.n == 8 and not result.better
    accuracy = statistics.compare(-ours, -theirs, margin=0.02, larger=True)
    assert accuracy.p_worse == pytest.approx(result.p_worse)
    assert accuracy.difference == pytest.approx(-result.difference)
    assert (accuracy.low, accuracy.high) == pytest.approx((-result.high, -result.low))


def test_clear_differences_are_found():
    better = statistics.compare([1.0, 1.1, 1.2], [2.0, 2.2, 2.1])
    assert better.better and better.high < 0 and better.p_worse > 0.99
    worse = statistics.compare([2.0, 2.2, 2.1], [1.0, 1.1, 1.2], margin=0.02)
    assert not worse.better and worse.p_worse < 0.01
    # without any spread the difference itself decides
    assert statistics.compare([1.0, 1.0], [1.0, 1.0]).p_worse == 1.0
    assert statistics.compare([1.03, 1.03], [1.0, 1.0], margin=0.02).p_worse == 0.0


def test_a_diverged_seed_is_lost_by_no_amount_so_signs_are_counted():
    lost = statistics.compare([1.0, nan, 1.0], [2.0, 2.0, 2.1])
    assert (lost.diverged, lost.rival_diverged, lost.difference) == (1, 0, inf)
    assert lost.p_worse == stats.binomtest(1, 3, alternative="greater").pvalue and np.isnan(lost.ours)
    won = statistics.compare([1.0, 1.1, 1.2], [2.0, nan, 2.1])
    assert won.p_better == 1 / 8 and not won.better and won.difference == won.low == -inf
    ten = statistics.compare(np.ones(10), [nan] * 10)
    assert ten.better and ten.p_better == 0.5**10 and ten.p_worse == 1.0
    # one divergence of the rival's does not outweigh nine seeds that it won
    mostly = statistics.compare(np.full(10, 2.0), [nan] + [1.0] * 9, margin=0.02)
    assert mostly.p_worse == stats.binomtest(9, 10, alternative="greater").pvalue and mostly.p_not_worse > 0.9
    # both diverged on one seed: the others decide
    both = statistics.compare([nan, 1.0, 1.1], [nan, 2.0, 2.2])
    assert both.better and both.p_worse > 0.9 and both.difference == pytest.approx(-1.05)
    accuracy = statistics.compare([0.9, nan], [0.5, 0.5], larger=True)
    assert accuracy.difference == -inf and accuracy.diverged == 1 and not accuracy.better


@pytest.mark.parametrize("ours", [[1.0, 1.4, 2.0], [nan, 1.4, 2.0], [1.0, nan, nan]])
@pytest.mark.parametrize("theirs", [[1.1, 1.2, 2.5], [1.1, nan, 2.5], [nan, nan, 2.5]])
def test_comparison_does_not_depend_on_who_is_ours(ours, theirs):
    one, other = statistics.compare(ours, theirs), statistics.compare(theirs, ours)
    assert (one.p_worse, one.p_better) == (other.p_better, other.p_worse)
    assert one.difference == pytest.approx(-other.difference, nan_ok=True)
    assert not (one.p_worse < 0.05 and other.p_worse < 0.05)


@pytest.mark.parametrize("ours, theirs", [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([nan, nan, 1.0], [nan, nan, 2.0])])
def test_comparison_refuses_what_is_not_paired(ours, theirs):
    with pytest.raises(ValueError, match="equally long lists of at least 2"):
        statistics.compare(ours, theirs)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_false_positive_rate_of_the_one_sided_test(n):
    """Truly worse by exactly the margin: found worse in 5 % of cases."""
    rng = np.random.default_rng(n)
    p = [statistics.t_test(rng.normal(0.02, 0.05, n), 0.02) for _ in range(1500)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.017)  # three standard errors


@pytest.mark.parametrize("n", [3, 5])
def test_false_positive_rate_of_better(n):
    """No true difference: found better in 2.5 % of cases, where the percentile interval of three says so in 12.5 %."""
    rng = np.random.default_rng(n)
    found = [statistics.compare(x, y) for x, y in rng.normal(size=(1000, 2, n))]
    assert np.mean([result.better for result in found]) == pytest.approx(0.025, abs=0.015)
    if n == 3:
        assert np.mean([result.high < 0 for result in found]) == pytest.approx(1 / 8, abs=0.035)


def test_not_worse_is_shown_where_the_spread_is_small_against_the_margin():
    ours, theirs = np.array([1.0, 1.01, 0.99, 1.0]), np.array([1.0, 1.0, 1.0, 1.001])
    tight, wide = (statistics.compare(scale * (ours - 1) + 1, theirs, margin=0.02) for scale in (1, 10))
    assert tight.p_not_worse == pytest.approx(stats.ttest_rel(ours, theirs + 0.02, alternative="less").pvalue)
    assert tight.p_not_worse < 0.05 < wide.p_not_worse and tight.p_worse > 0.05 and wide.p_worse > 0.05


def test_holm_controls_the_family():
    assert statistics.holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert len(statistics.holm([])) == 0
    p = np.random.default_rng(2).random((4000, 5))
    assert np.mean([(statistics.holm(row) <= 0.05).any() for row in p]) == pytest.approx(0.05, abs=0.011)


def test_costs_and_values():
    cost, value = [0.0, 10.0, 20.0, 30.0], [5.0, 3.0, 2.0, 2.5]
    assert statistics.cost_to_target(cost, value, 3.0) == 10.0
    assert statistics.cost_to_target(cost, value, 1.0) == inf
    assert statistics.cost_to_target(cost, [0.1, 0.5, 0.7, nan], 0.6, larger=True) == 20.0
    assert statistics.value_at_cost(cost, value, 15.0) == 2.5
    assert statistics.value_at_cost(cost, value, 30.0) == 2.5
    assert np.isnan(statistics.value_at_cost(cost, value, 31.0))


def test_performance_profile_by_hand():
    """Three tasks, three methods; the third task is solved by one alone, the second method misses one."""
    costs = [[10.0, 20.0, 30.0], [8.0, inf, 4.0], [inf, inf, 7.0]]
    assert statistics.cost_ratios(costs).tolist() == [[1.0, 2.0, 3.0], [2.0, inf, 1.0], [inf, inf, 1.0]]
    profile = statistics.performance_profile(costs, [1.0, 1.99, 2.0, 3.0, 4.0])
    assert profile == pytest.approx(np.array([[1, 0, 2], [1, 0, 2], [2, 1, 2], [2, 1, 3], [2, 1, 3]]) / 3)
    # areas from 1 to 4 over 3: (3 + 2 + 0)/9, (2 + 0 + 0)/9, (1 + 3 + 3)/9
    assert statistics.profile_area(costs) == pytest.approx(np.array([5, 2, 7]) / 9)


def test_profile_area_is_the_normalised_integral():
    """AlgoPerf's score: the trapezoid rule over the profile from 1 to 4, over 3; the exact area is its limit."""
    costs = np.random.default_rng(3).lognormal(size=(9, 5))
    taus = np.linspace(1, 4, 200_001)
    expected = integrate.trapezoid(statistics.performance_profile(costs, taus), taus, axis=0) / 3
    assert statistics.profile_area(costs) == pytest.approx(expected, abs=1e-4)


def test_unsolved_and_free_tasks_in_profiles():
    assert statistics.cost_ratios([[inf, inf]]).tolist() == [[inf, inf]]
    assert statistics.cost_ratios([[0.0, 5.0]]).tolist() == [[1.0, inf]]


@pytest.mark.parametrize("larger", [False, True])
def test_best_of_k_equals_enumeration(larger):
    rng = np.random.default_rng(4)
    scores, values = rng.random(6), rng.random(6)
    scores[2], values[2] = nan, inf  # diverged
    low, middle, high = statistics.best_of_k(scores, values, larger)
    worst = -inf if larger else inf
    kept = np.where(np.isfinite(scores), scores, worst)
    for k in range(1, 7):
        chosen = []
        for subset in combinations(range(6), k):
            chosen.append(values[(max if larger else min)(subset, key=lambda i: kept[i])])
        expected = np.quantile(chosen, [0.25, 0.5, 0.75], method="inverted_cdf")
        assert (low[k - 1], middle[k - 1], high[k - 1]) == pytest.approx(tuple(expected))


def test_sensitivity():
    rates = [1e-3, 1e-2, 1e-1, 1.0]
    assert statistics.sensitivity_width(rates, [1.05, 1.0, 1.09, 1.2]) == pytest.approx(2.0)
    assert statistics.sensitivity_width(rates, [0.5, 0.88, 0.9, -inf], larger=True) == pytest.approx(1.0)
    assert np.isnan(statistics.sensitivity_width(rates, [inf] * 4))
    assert statistics.near_best([inf, 2.0, 2.3]).tolist() == [False, True, False]
