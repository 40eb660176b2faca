"""Every algorithm as a slow float64 loop over clients, steps and examples: no JAX, no masks."""

import numpy as np


def gradient(w, rows):
    """Of the mean over rows of tanh(w x) regression; w is {"a": [d], "b": []}."""
    total = {"a": np.zeros_like(w["a"]), "b": 0.0}
    for x, y in rows:
        z = np.tanh(w["a"] @ x + w["b"])
        slope = 2 * (z - y) * (1 - z**2)
        total["a"] += slope * x / len(rows)
        total["b"] += slope / len(rows)
    return total


def plus(one, other, scale=1.0):
    return {k: one[k] + scale * other[k] for k in one}


def scaled(tree, scale):
    return {k: scale * v for k, v in tree.items()}


def minus(one, other):
    return plus(one, other, -1.0)


def zeros(w):
    return scaled(w, 0.0)


def weighted(parts, weights):
    total = zeros(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total = plus(total, part, weight / sum(weights))
    return total


def sgd(w, batches, rate, correct=lambda g, w: g, momentum=0.0):
    trace = zeros(w)
    for rows in batches:
        g = correct(gradient(w, rows), w)
        trace = plus(g, trace, momentum)
        w = plus(w, trace, -rate)
    return w


def fed_avg(w, cohort, rate, proximal=0.0):
    """cohort: per client its batches (lists of (x, y)) and number of examples."""
    moved, weights = [], []
    for batches, size in cohort:
        own = sgd(w, batches, rate, lambda g, p: plus(g, minus(p, w), proximal))
        moved.append(minus(own, w))
        weights.append(size)
    return plus(w, weighted(moved, weights))


def scaffold(w, control, variates, cohort, ids, rate, population):
    moved, changes = [], []
    for (batches, _), k in zip(cohort, ids, strict=True):
        own = sgd(w, batches, rate, lambda g, p, k=k: plus(g, minus(control, variates[k])))
        moved.append(minus(own, w))
        if batches:
            fresh = plus(minus(variates[k], control), minus(w, own), 1 / (len(batches) * rate))
        else:
            fresh = variates[k]
        changes.append(minus(fresh, variates[k]))
        variates[k] = fresh
    even = [1.0] * len(cohort)
    w = plus(w, weighted(moved, even))
    control = plus(control, weighted(changes, even), len(cohort) / population)
    return w, control, variates


def fed_nova(w, cohort, rate, momentum):
    directions, weights, steps = [], [], []
    for batches, size in cohort:
        own = sgd(w, batches, rate, momentum=momentum)
        # How often each gradient ends up in the sum of changes.
        effective = sum(
            sum(momentum**j for j in range(len(batches) - i)) for i in range(len(batches))
        )
        directions.append(scaled(minus(own, w), 1 / max(effective, 1)))
        weights.append(size)
        steps.append(effective)
    mean_steps = sum(s * n for s, n in zip(steps, weights, strict=True)) / sum(weights)
    return plus(w, weighted(directions, weights), mean_steps)


def mime_lite(w, trace, cohort, rate, momentum):
    moved, gradients, weights = [], [], []
    for batches, size in cohort:
        own = w
        for rows in batches:
            own = plus(own, plus(gradient(own, rows), trace, momentum), -rate)
        moved.append(minus(own, w))
        everything = [row for rows in batches for row in rows]  # one epoch
        gradients.append(gradient(w, everything) if everything else zeros(w))
        weights.append(size)
    trace = plus(weighted(gradients, weights), trace, momentum)
    return plus(w, weighted(moved, weights)), trace
