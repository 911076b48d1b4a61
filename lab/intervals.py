"""What a few seeds can tell: 95 % intervals of differences and shares, and which widths are as good as the best.

    mean, half = contrast((1, wide), (-1, narrow))      # of accuracies over seeds: mean +- half at 95 %

Seeds are treated as independent. Runs of one seed share the order of the examples and a part of the initial weights,
which makes intervals of differences a little too wide, if anything.
"""

import math

import numpy as np


def welch(*terms):
    """(value, standard error, degrees of freedom) of a sum of means: terms (factor, values over seeds). Each has a
    variance of its own; degrees of freedom by Welch and Satterthwaite. The last two are nan if a mean is of one seed.
    """
    value = float(sum(factor * np.mean(values) for factor, values in terms))
    if min(len(values) for _, values in terms) < 2:
        return value, math.nan, math.nan
    variances = np.array([factor**2 * np.var(values, ddof=1) / len(values) for factor, values in terms])
    parts = sum(s**2 / (len(values) - 1) for s, (_, values) in zip(variances, terms))
    return value, variances.sum() ** 0.5, variances.sum() ** 2 / parts if parts else math.inf


def contrast(*terms):
    """(value, half of its 95 % interval) of a sum of means, by Student's t; half is nan if some mean is of one seed."""
    from scipy.stats import t

    value, error, freedom = welch(*terms)
    return value, float(t.ppf(0.975, freedom) * error)


def share(part, whole, start):
    """(part - start) / (whole - start) of means over seeds, with half of its 95 % interval: of the expression's first
    order in the three means.
    """
    all_of_it = np.mean(whole) - np.mean(start)
    value = (np.mean(part) - np.mean(start)) / all_of_it
    _, half = contrast((1 / all_of_it, part), (-value / all_of_it, whole), ((value - 1) / all_of_it, start))
    return float(value), half


def indistinguishable(widths, errors):
    """The widths whose mean error, of a list over seeds for each, is not found greater than the least: by Welch's
    one-sided t test, at 5 % for all widths together (Bonferroni). All of them with fewer than three seeds.
    """
    from scipy.stats import t

    if min(map(len, errors)) < 3 or len(widths) == 1:
        return list(widths)
    best, alike, level = min(errors, key=np.mean), [], 0.05 / (len(widths) - 1)
    for width, those in zip(widths, errors):
        greater, error, freedom = welch((1, those), (-1, best))
        if those is best or greater <= error * t.ppf(1 - level, freedom):
            alike.append(width)
    return alike


def best_of(widths, errors, rng, resamples=10_000):
    """(the width of least mean error, (low, high), the indistinguishable widths) from errors of several seeds a width.

    low, high: hold 95 % of the best widths when the seeds of each width are drawn again with replacement; too narrow
    where several widths are equally good.
    """
    best = int(np.argmin([e.mean() for e in errors]))
    if min(map(len, errors)) < 3:
        return widths[best], (widths[0], widths[-1]), list(widths)
    means = np.array([rng.choice(e, (resamples, len(e))).mean(1) for e in errors])  # (widths, resamples)
    found, outside = np.sort(np.take(widths, means.argmin(0))), int(0.025 * resamples)
    return widths[best], (int(found[outside]), int(found[-1 - outside])), indistinguishable(widths, errors)
