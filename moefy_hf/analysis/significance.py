"""The mathematics of finding function without finding noise: permutation tests by their exact moments, and false
discovery rates. Pure functions.

The unit is the text: tokens of one text are not independent.
"""

import numpy as np
from scipy.stats import pearson3

FEWEST_TEXTS = 10  # of a class, or with a token: less is not tested


def upper_tail(excess: np.ndarray, variance: np.ndarray, third: np.ndarray) -> np.ndarray:
    """Return P(X >= excess) of a sum X with mean 0 and these second and third cumulants, nan where nothing varies.

    X is taken to have a Pearson type III distribution, with the exact moments of a permutation distribution (Mielke
    and Berry). All arrays have one shape.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        z, skew = excess / np.sqrt(variance), third / variance**1.5
    tested = np.isfinite(z) & np.isfinite(skew) & (variance > 1e-12)
    p = np.full(np.shape(excess), np.nan)
    p[tested] = pearson3.sf(z[tested], skew[tested])
    return p


def class_excess(totals: np.ndarray, counts: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Test whether texts of a class use an expert more than texts of the others: labels are permuted over texts.

    Args:
        totals: (C, E) summed share of tokens that used the expert, over the texts of each class.
        counts: (C,) texts of each class.
        moments: (3, E) sums over all texts of that share, its square and its cube.

    Returns:
        how many times as often as in all texts (C, E), and one-sided p-values (C, E): nan where a class has fewer
        than `FEWEST_TEXTS` texts, hardly more texts use the expert, or all texts are alike.
    """
    texts, n = counts.sum(), counts[:, None].astype(float)
    mean = moments[0] / texts
    variance = moments[1] / texts - mean**2  # of one text; these are the whole population
    third = moments[2] / texts - 3 * mean * moments[1] / texts + 2 * mean**3
    # drawn without replacement: n of N values
    scale = n * (texts - n) / max(texts - 1, 1)
    skewed = scale * (texts - 2 * n) / max(texts - 2, 1)
    p = upper_tail(totals - n * mean, scale * variance, skewed * third)
    p[counts < FEWEST_TEXTS] = np.nan
    p[:, moments[0] ** 2 < FEWEST_TEXTS * moments[1]] = np.nan  # its use is that of a few texts
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals / n / mean, p


def token_excess(
    observed: np.ndarray, expected: np.ndarray, variance: np.ndarray, third: np.ndarray, texts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Test whether a token uses an expert more than the other tokens of the same text do.

    Tokens are permuted within texts (Mantel and Haenszel); repetitions within one text count as one.

    Args:
        observed, expected, variance, third: (M, E) sums over texts of the token's share of use, and of the mean and
            cumulants that one token drawn from the same text has.
        texts: (M,) texts with the token.

    Returns:
        times as often (M, E), and one-sided p-values (M, E), nan where too few texts have the token.
    """
    p = upper_tail(observed - expected, variance, third)
    p[texts < FEWEST_TEXTS] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return observed / expected, p


def false_discoveries(p: np.ndarray, rate: float = 0.05) -> np.ndarray:
    """Return which hypotheses may be rejected so that at most `rate` of those are expected to be true (Benjamini and
    Hochberg).

    Args:
        p: p-values of any shape; nan is not tested.

    Returns:
        bool of the same shape.
    """
    tested = np.isfinite(p)
    ordered = np.sort(p[tested])
    passed = np.flatnonzero(ordered <= rate * np.arange(1, len(ordered) + 1) / max(len(ordered), 1))
    rejected = np.zeros(p.shape, bool)
    if len(passed):
        rejected[tested] = p[tested] <= ordered[passed[-1]]
    return rejected


def explained_variance(totals: np.ndarray, counts: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Return (E,), the share of the variance of an expert's use over texts that classes explain.

    It is adjusted (epsilon squared): 0 on average where labels mean nothing; nan where the expert's use does not vary.

    Args:
        totals, counts, moments: as in `class_excess`.
    """
    seen, texts = counts > 0, counts.sum()
    classes = int(seen.sum())
    whole = moments[1] - moments[0] ** 2 / texts
    between = (totals[seen] ** 2 / counts[seen, None]).sum(0) - moments[0] ** 2 / texts
    within = (whole - between) / max(texts - classes, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 1e-9 * texts, (between - (classes - 1) * within) / whole, np.nan)


def shared_function(totals: np.ndarray, counts: np.ndarray, expert: np.ndarray) -> float:
    """Return how alike, over classes, the neurons of one expert are.

    This is the share of the variance of neurons' class profiles that lies between experts, adjusted: 1 where all
    neurons of an expert have one profile, 0 on average for random experts.

    Args:
        totals: (C, f) summed activation, over the texts of each class; counts (C,).
        expert: (f,) of each neuron.
    """
    seen = counts > 0
    n = counts[seen, None] / counts.sum()
    means = totals[seen] / counts[seen, None]
    profiles = np.sqrt(n) * (means - (n * means).sum(0))  # (C, f)
    length = np.linalg.norm(profiles, axis=0)
    alive = length > 1e-12
    profiles, expert = profiles[:, alive] / length[alive], expert[alive]
    sizes = np.bincount(expert).astype(float)
    centres = np.stack([np.bincount(expert, row, len(sizes)) for row in profiles])[:, sizes > 0] / sizes[sizes > 0]
    mean = profiles.mean(1, keepdims=True)
    whole = ((profiles - mean) ** 2).sum()
    between = (sizes[sizes > 0] * (centres - mean) ** 2).sum() / max(whole, 1e-30)
    chance = ((sizes > 0).sum() - 1) / max(len(expert) - 1, 1)
    return float((between - chance) / (1 - chance))


def entropy(load: np.ndarray) -> float:
    """Return the entropy of a load (E,) relative to an even one, in [0, 1]."""
    share = load / max(load.sum(), 1e-12)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(max(len(load), 2)))


def correlations(pairs: np.ndarray, left: np.ndarray, right: np.ndarray, tokens: int) -> np.ndarray:
    """Return phi coefficients (E, F) of experts that run together; 0 where an expert always or never runs.

    Args:
        pairs, left, right: (E, F), (E,), (F,), counts of tokens that use both, and one.
        tokens: how many there are.
    """
    a, b = left / tokens, right / tokens
    deviations = np.sqrt(np.outer(a * (1 - a), b * (1 - b)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(deviations > 1e-9, (pairs / tokens - np.outer(a, b)) / deviations, 0.0)


def alignment(cross: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """Return the linear CKA of two layers' experts, in [0, 1].

    Args:
        cross, left, right: covariances of use, (E, F) of both layers, (E, E) and (F, F) within each.
    """
    return float((cross**2).sum() / max(np.linalg.norm(left) * np.linalg.norm(right), 1e-30))
