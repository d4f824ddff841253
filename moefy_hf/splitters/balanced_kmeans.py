"""Balanced k-means: clusters of exactly equal size with little inertia."""

import torch

from ..errors import MoefyError
from .equal_parts import blocks, grow_parts, labels_of, multilevel_parts, swap_rows, weight_inside


def inertia(points: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the sum of squared distances of points (n, d) to the mean of their cluster, which labels (n,) name."""
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    sizes = torch.bincount(labels).clamp_min(1)
    means = points.new_zeros(len(sizes), points.shape[1]).index_add_(0, labels, points) / sizes[:, None]  # (k, d)
    return (points - means[labels]).square().sum(dtype=torch.float64).item()


def balanced_kmeans(
    points: torch.Tensor,
    num_clusters: int,
    generator: torch.Generator,
    starts: int = 1,
    max_iterations: int = 5,
    warm: bool = False,
) -> torch.Tensor:
    """Return labels (n,) of `num_clusters` clusters of exactly n / num_clusters points, with little inertia.

    The parameter clustering of MoEfication (section 3.2). Clusters are grown around random points and improved by
    swaps of two points that lower the inertia, instead of by assignment to centres that stand still meanwhile (see
    `equal_parts`). Needs n^2 floats of memory; d enters only in the one product that makes them.

    Args:
        points: (n, d), of any floating-point type and scale, on any device.
        generator: on any device; the same seed gives the same labels.
        starts: searches to keep the lowest inertia of. The first, third, ... grow clusters of points; the others solve
            the problem for couples of points before, which takes twice as long and pays where points are unevenly
            spread.
        max_iterations: most sweeps over all pairs of clusters in one search.
        warm: search from the blocks of n / num_clusters points that follow each other, too.

    Raises:
        MoefyError: n is not a multiple of num_clusters, a point is not finite, or an argument is out of range.
    """
    if points.dim() != 2 or not points.is_floating_point():
        raise MoefyError(f"points must be a floating-point matrix, got {points.dtype} of shape {tuple(points.shape)}")
    n = len(points)
    if num_clusters < 1 or n == 0 or n % num_clusters:
        raise MoefyError(f"{n} points cannot be put into {num_clusters} clusters of equal size")
    if starts < 1 or max_iterations < 0:
        raise MoefyError(f"starts must be >= 1 and max_iterations >= 0, got {starts} and {max_iterations}")
    points = points.detach().to(torch.promote_types(points.dtype, torch.float32))
    points = points - points.mean(0)  # leaves all distances alone and makes the products below exacter
    gram = points @ points.T  # (n, n)
    if not torch.isfinite(gram.diagonal()).all():
        raise MoefyError("points must be finite, and their squares too")

    def search(start: int) -> torch.Tensor:
        if start % 2:
            return multilevel_parts(gram, num_clusters, generator, max_iterations)
        return swap_rows(gram, grow_parts(gram, num_clusters, generator), generator, max_iterations)

    searched = list(map(search, range(starts)))
    if warm:
        searched.append(swap_rows(gram, blocks(n, num_clusters, gram.device), generator, max_iterations))
    return labels_of(max(searched, key=lambda members: weight_inside(gram, members)))
