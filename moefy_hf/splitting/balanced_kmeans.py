"""Balanced k-means: clusters of exactly equal size."""

import torch

from .equal_parts import labels_of, multilevel_parts, weight_inside


def balanced_kmeans(
    points: torch.Tensor, num_clusters: int, generator: torch.Generator, starts: int = 2
) -> torch.Tensor:
    """Cluster points into equally many per cluster, with little squared distance to the cluster means (the inertia).

    Deterministic under the generator's seed; memory is one (n, n) matrix and a third.

    Args:
        points: (n, d).
        starts: independent attempts, of which the best is kept.

    Returns:
        (n,) the cluster of each point.

    Raises:
        ValueError: n is not a multiple of `num_clusters`, or a point is not finite.
    """
    n = len(points)
    if num_clusters < 1 or n % num_clusters:
        raise ValueError(f"{n} points do not split into {num_clusters} clusters of equal size")
    if not points.isfinite().all():
        raise ValueError("points to cluster must be finite")
    centred = points.float() - points.float().mean(0)  # smaller numbers, the same inertia
    gram = centred @ centred.T  # (n, n)
    attempts = (multilevel_parts(gram, num_clusters, generator) for _ in range(starts))
    return labels_of(max(attempts, key=lambda members: weight_inside(gram, members)))


def inertia(points: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum of squared distances of points (n, d) to the mean of their cluster, labels (n,)."""
    points = points.double()
    clusters = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=clusters).clamp_min(1)
    means = points.new_zeros(clusters, points.shape[1]).index_add_(0, labels, points) / counts[:, None]
    return float((points - means[labels]).square().sum())
