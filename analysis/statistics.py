"""The protocol's statistics: paired comparisons, costs to a target, performance profiles, searches.

Values are losses (smaller is better) unless `larger=True`. A diverged run is a miss: an infinite cost, a lost seed in a
comparison, an infinitely bad trial. It is never given an invented value.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from scipy import stats

ALPHA = 0.05
TAU = 4.0  # where AlgoPerf's performance profiles end


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of our method with a rival over the same seeds.

    Attributes:
        n: Pairs.
        ours, theirs: Means over the pairs (nan where a run diverged).
        difference: Mean of ours minus theirs; for losses negative is better (infinite where runs diverged).
        low, high: 95 % bootstrap interval of the difference.
        margin: By how much ours may be worse, in the values' own unit.
        p_worse: One-sided p of "ours is worse by more than the margin": of the paired t-test, or of the sign test where
            a run diverged.
        p_better: The same of "ours is better".
        p_not_worse: The same of "ours is not worse by more than the margin" (non-inferiority).
        diverged, rival_diverged: How many of our runs did, and of the rival's.
        better: `p_better` is at most half of `ALPHA`: a two-sided test at `ALPHA` in our favour. (The protocol has an
            interval that excludes 0; of few pairs the bootstrap's does so too often, of 3 by chance 1 time in 8.)
    """

    n: int
    ours: float
    theirs: float
    difference: float
    low: float
    high: float
    margin: float
    p_worse: float
    p_better: float
    p_not_worse: float
    better: bool
    diverged: int
    rival_diverged: int


def compare(ours, theirs, margin: float = 0.0, larger: bool = False) -> Comparison:
    """Compare paired values; nan or infinity stands for a diverged run.

    A seed on which one of the two diverged is lost for it, by infinity, and says nothing of how much: so where there is
    one, signs are counted. A seed on which both did is left out.

    Raises:
        ValueError: fewer than two seeds are left, or the lists have not one length.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    lost, won = ~np.isfinite(ours), ~np.isfinite(theirs)
    if ours.shape != theirs.shape or ours.ndim != 1 or (~(lost & won)).sum() < 2:
        raise ValueError(f"a paired comparison needs two equally long lists of at least 2 values, not {ours.shape}")
    excess = np.where(
        lost, np.inf, np.where(won, -np.inf, theirs - ours if larger else ours - theirs)
    )  # above 0: worse
    excess = excess[~(lost & won)]
    finite = excess[np.isfinite(excess)]
    test = t_test if len(finite) == len(excess) else sign_test
    p_worse, p_better, p_not_worse = test(excess, margin), test(-excess), test(-excess, -margin)
    low, high = bootstrap_interval(finite)
    mean = finite.mean() if len(finite) else np.nan
    if lost.sum() > won.sum():
        mean, high = np.inf, np.inf
    elif won.sum() > lost.sum():
        mean, low = -np.inf, -np.inf
    if larger:
        mean, low, high = -mean, -high, -low
    return Comparison(
        len(ours), _mean(ours), _mean(theirs), float(mean), low, high, margin, p_worse, p_better, p_not_worse,
        better=p_better <= ALPHA / 2, diverged=int(lost.sum()), rival_diverged=int(won.sum()),
    )  # fmt: skip


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if np.isfinite(values).all() else np.nan


def t_test(differences, margin: float = 0.0) -> float:
    """One-sided p-value of "the mean difference is above the margin" (scipy's one-sample t-test; 1.0 for one pair).

    >>> round(t_test([1.0, 2.0, 3.0]), 4)
    0.0371
    """
    differences = np.asarray(differences, float)
    if len(differences) < 2:
        return 1.0
    spread = np.ptp(differences)
    if spread <= 1e-12 * np.abs(differences).max(initial=0):
        # No spread to judge by (deterministic methods): the difference itself decides.
        return 0.0 if differences.mean() > margin else 1.0
    return float(stats.ttest_1samp(differences, margin, alternative="greater").pvalue)


def sign_test(differences, margin: float = 0.0) -> float:
    """One-sided p-value of "more differences are above the margin than below it" (scipy's binomial test).

    >>> sign_test([1.0, 2.0, float("inf")])
    0.125
    """
    differences = np.asarray(differences, float)
    above, below = int((differences > margin).sum()), int((differences < margin).sum())
    return float(stats.binomtest(above, above + below, alternative="greater").pvalue) if above + below else 1.0


def bootstrap_interval(differences, confidence: float = 0.95, resamples: int = 9999) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, with a fixed seed.

    With few pairs it is narrower than it should be (with 3 it excludes 0 whenever all three agree in sign, 1 time in 4
    by chance): reports show n beside it.
    """
    differences = np.asarray(differences, float)
    if len(differences) < 2:
        return np.nan, np.nan
    if np.ptp(differences) == 0:
        return float(differences.mean()), float(differences.mean())
    interval = stats.bootstrap(
        (differences,), np.mean, confidence_level=confidence, n_resamples=resamples, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def holm(p_values) -> np.ndarray:
    """Holm's adjusted p-values.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, float)
    ranked = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[ranked] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[ranked] = np.minimum(adjusted, 1.0)
    return result


def cost_to_target(cost, value, target: float, larger: bool = False) -> float:
    """The cost of the first evaluation whose value reaches the target; infinity for a miss.

    >>> cost_to_target([0, 1, 2], [9.0, 5.0, 4.0], 5.0), cost_to_target([0, 1, 2], [9.0, 5.0, 4.0], 3.0)
    (1.0, inf)
    """
    value = np.asarray(value, float)
    reached = value >= target if larger else value <= target
    return float(np.asarray(cost, float)[reached.argmax()]) if reached.any() else np.inf


def value_at_cost(cost, value, at: float) -> float:
    """The value at a given cost, linear between evaluations (nan outside them)."""
    cost, value = np.asarray(cost, float), np.asarray(value, float)
    known = np.isfinite(cost) & np.isfinite(value)
    return float(np.interp(at, cost[known], value[known], left=np.nan, right=np.nan)) if known.any() else np.nan


def cost_ratios(costs: np.ndarray) -> np.ndarray:
    """Costs (tasks × methods) over the best of each task; a task that none solved is a miss for all."""
    costs = np.asarray(costs, float)
    best = costs.min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(best > 0, costs / best, np.where(costs == 0, 1.0, np.inf))
    return np.where(np.isfinite(costs), ratios, np.inf)


def performance_profile(costs: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """Share of tasks each method solves within τ times the best cost: (taus × methods) from (tasks × methods)."""
    return (cost_ratios(costs)[None] <= np.asarray(taus, float)[:, None, None]).mean(axis=1)


def profile_area(costs: np.ndarray, tau: float = TAU) -> np.ndarray:
    """Area under each method's profile from 1 to τ over τ − 1: in [0, 1], 1 for the best on every task.

    A task solved at ratio r adds the steps from r to τ, so the area is exact.

    >>> profile_area([[1.0, 2.0], [3.0, 1.0]]).round(4).tolist()
    [0.6667, 0.8333]
    """
    return (np.clip(tau - cost_ratios(costs), 0, None) / (tau - 1)).mean(axis=0)


def best_of_k(scores, values, larger: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a user with k = 1 … K trials gets: quartiles over all choices of k of the K trials, exactly.

    The trial with the best score (on the validation split) is taken and its value reported.

    Args:
        scores: Selection scores; nan or infinite for a diverged trial.
        values: The quantity shown, e.g. the training loss at the end; infinite for a diverged trial.
        larger: Whether a larger *score* is better.

    Returns:
        First quartile, median and third quartile of the value for each k.
    """
    scores, values = np.asarray(scores, float), np.asarray(values, float)
    scores = np.where(np.isfinite(scores), -scores if larger else scores, np.inf)
    trials = len(scores)
    values = values[np.argsort(scores, kind="stable")]
    by_value = np.argsort(values, kind="stable")
    quartiles = np.empty((3, trials))
    for k in range(1, trials + 1):
        # The i-th best trial is the one taken if it is drawn and no better one is.
        taken = np.array([comb(trials - 1 - i, k - 1) for i in range(trials)]) / comb(trials, k)
        cumulative = np.cumsum(taken[by_value])
        quartiles[:, k - 1] = values[by_value[np.searchsorted(cumulative, np.array([0.25, 0.5, 0.75]) - 1e-12)]]
    return quartiles[0], quartiles[1], quartiles[2]


def near_best(values, larger: bool = False) -> np.ndarray:
    """Which values are within 10 % of the best; never a diverged one."""
    values = np.asarray(values, float)
    finite = np.isfinite(values)
    if not finite.any():
        return finite
    best = values[finite].max() if larger else values[finite].min()
    limit = 0.1 * abs(best)
    return finite & ((values >= best - limit) if larger else (values <= best + limit))


def sensitivity_width(rates, values, larger: bool = False) -> float:
    """Decades between the smallest and the largest rate within 10 % of the best (nan if all diverged).

    >>> sensitivity_width([0.001, 0.01, 0.1, 1.0], [5.0, 4.1, 4.0, float("inf")])
    1.0
    """
    near = np.asarray(rates, float)[near_best(values, larger)]
    return float(np.log10(near.max() / near.min())) if len(near) else np.nan
