"""Balanced k-means and the search under it: exact sizes, no lost inertia, known optima, seeds."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from moefy_hf.splitters.balanced_kmeans import balanced_kmeans, inertia
from moefy_hf.splitters.equal_parts import (
    _rounds,
    coarsen,
    grow_parts,
    labels_of,
    multilevel_parts,
    swap_rows,
    weight_inside,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=seeded(seed)), dim=-1)


def blobs(k: int, m: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (k*m, 16) around k centres and their labels, in random order."""
    generator = seeded(seed)
    labels = torch.arange(k).repeat_interleave(m)[torch.randperm(k * m, generator=generator)]
    points = torch.randn(k, 16, generator=generator)[labels] + noise * torch.randn(k * m, 16, generator=generator)
    return points, labels


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a[:, None] == a, b[:, None] == b)


def best_inertia(points: torch.Tensor, num_clusters: int) -> float:
    """The lowest inertia of any balanced clustering, by trying all."""
    n = len(points)
    equal = torch.arange(n) // (n // num_clusters)
    orders = set(itertools.permutations(equal.tolist()))
    return min(inertia(points, torch.tensor(labels)) for labels in orders)


@pytest.mark.parametrize("starts", [1, 2])
@pytest.mark.parametrize("n, num_clusters", [(1, 1), (6, 6), (7, 1), (12, 4), (45, 9), (60, 5), (96, 3), (128, 32)])
def test_sizes_are_equal(n, num_clusters, starts):
    labels = balanced_kmeans(unit_rows(n, 8), num_clusters, seeded(), starts=starts)
    assert labels.dtype == torch.long and labels.shape == (n,)
    assert torch.bincount(labels, minlength=num_clusters).tolist() == [n // num_clusters] * num_clusters


def test_same_seed_same_labels_other_seeds_may_differ():
    points = unit_rows(160, 32)
    first, again, other = (balanced_kmeans(points, 16, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not same_partition(first, other)


@pytest.mark.parametrize("starts", [1, 2])
@pytest.mark.parametrize("k, m", [(4, 8), (16, 16), (9, 7), (20, 32)])
def test_recovers_blobs_exactly(k, m, starts):
    points, labels = blobs(k, m, noise=0.05)
    assert same_partition(balanced_kmeans(points, k, seeded(), starts=starts), labels)


@pytest.mark.parametrize("num_clusters", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum_of_tiny_problems(num_clusters, seed):
    points = torch.randn(8, 3, generator=seeded(seed))
    labels = balanced_kmeans(points, num_clusters, seeded(), starts=8)
    assert inertia(points, labels) == pytest.approx(best_inertia(points, num_clusters), rel=1e-5)


def test_beats_random_splits_and_a_local_optimum_has_no_swap_left():
    points = unit_rows(192, 64)
    labels = balanced_kmeans(points, 24, seeded(), max_iterations=100)
    found = inertia(points, labels)
    random = [inertia(points, torch.arange(192)[torch.randperm(192, generator=seeded(s))] % 24) for s in range(20)]
    assert found < 0.95 * min(random)

    # small clusters, so that every member is among the candidates: then no single swap may lower the inertia
    labels = balanced_kmeans(points, 48, seeded(), max_iterations=100)
    found = inertia(points, labels)
    for i, j in itertools.islice(itertools.combinations(range(192), 2), 0, None, 7):
        swapped = labels.clone()
        swapped[i], swapped[j] = labels[j], labels[i]
        assert inertia(points, swapped) > found - 1e-4


def test_is_at_least_as_good_as_k_means_constrained():
    k_means_constrained = pytest.importorskip("k_means_constrained")
    points = unit_rows(384, 96)
    theirs = k_means_constrained.KMeansConstrained(24, size_min=16, size_max=16, n_init=1, random_state=0)
    labels = torch.from_numpy(theirs.fit_predict(points.numpy())).long()
    assert inertia(points, balanced_kmeans(points, 24, seeded())) < inertia(points, labels)


def test_more_starts_and_sweeps_never_hurt():
    points = unit_rows(160, 24)
    by_starts = [inertia(points, balanced_kmeans(points, 10, seeded(), starts=starts)) for starts in (1, 2, 4)]
    assert by_starts == sorted(by_starts, reverse=True)
    by_sweeps = [inertia(points, balanced_kmeans(points, 10, seeded(), max_iterations=i)) for i in (0, 1, 3, 30)]
    assert by_sweeps == sorted(by_sweeps, reverse=True) and by_sweeps[0] > by_sweeps[-1]


def test_equivariances():
    points, labels = blobs(12, 8, noise=0.05)
    order = torch.randperm(96, generator=seeded(9))
    assert same_partition(balanced_kmeans(points[order], 12, seeded()), labels[order])
    # scale and position of the cloud do not matter, nor does the number format of points that fit it
    expected = balanced_kmeans(points, 12, seeded())
    assert torch.equal(balanced_kmeans(points * 1e-4, 12, seeded()), expected)
    assert torch.equal(balanced_kmeans(points + 50, 12, seeded()), expected)
    assert torch.equal(balanced_kmeans(points.double(), 12, seeded()), expected)
    assert same_partition(balanced_kmeans(points.bfloat16(), 12, seeded()), labels)


def test_degenerate_points():
    for points in (torch.zeros(32, 4), torch.ones(32, 4), torch.eye(32)):
        labels = balanced_kmeans(points, 8, seeded(), starts=2)
        assert torch.bincount(labels).tolist() == [4] * 8


def test_does_not_modify_its_input():
    points = unit_rows(64, 8).requires_grad_()
    before = points.detach().clone()
    labels = balanced_kmeans(points, 8, seeded())
    assert torch.equal(points, before) and not labels.requires_grad


@pytest.mark.parametrize(
    "points, num_clusters, options, message",
    [
        (torch.zeros(10, 2), 3, {}, "10 points .* 3 clusters"),
        (torch.zeros(10, 2), 0, {}, "0 clusters"),
        (torch.zeros(0, 2), 1, {}, "0 points"),
        (torch.zeros(4, 2, 2), 2, {}, "matrix"),
        (torch.zeros(4, 2, dtype=torch.long), 2, {}, "floating-point"),
        (torch.full((4, 2), torch.nan), 2, {}, "finite"),
        (torch.tensor([[torch.inf], [0.0]]), 2, {}, "finite"),
        (torch.zeros(4, 2), 2, {"starts": 0}, "starts"),
        (torch.zeros(4, 2), 2, {"max_iterations": -1}, "max_iterations"),
    ],
)
def test_refuses(points, num_clusters, options, message):
    with pytest.raises(ValueError, match=message):
        balanced_kmeans(points, num_clusters, seeded(), **options)


# the search under it


def random_graph(n: int, seed: int = 0) -> torch.Tensor:
    weights = torch.rand(n, n, generator=seeded(seed)).pow(4)
    return weights + weights.T


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 12])
def test_rounds_pair_all_parts_once_and_disjointly(k):
    pairs = []
    for a, b in _rounds(k, seeded()):
        both = torch.cat([a, b])
        assert len(both.unique()) == len(both)
        pairs += [tuple(sorted(pair)) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert sorted(pairs) == list(itertools.combinations(range(k), 2))


def test_weight_inside_against_a_loop():
    weights, members = random_graph(24), torch.randperm(24, generator=seeded()).view(4, 6)
    labels = labels_of(members)
    expected = sum(weights[i, j].item() for i in range(24) for j in range(24) if labels[i] == labels[j])
    assert weight_inside(weights, members) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("candidates", [1, 4, 100])
def test_swaps_raise_the_weight_inside_sweep_by_sweep(candidates):
    weights, start = random_graph(120), torch.randperm(120, generator=seeded()).view(15, 8)
    before = start.clone()
    reached = [
        weight_inside(weights, swap_rows(weights, start, seeded(), sweeps, candidates=candidates))
        for sweeps in (0, 1, 2, 50)
    ]
    assert torch.equal(start, before)
    assert reached[0] == weight_inside(weights, start)
    assert reached == sorted(reached) and reached[-1] > 1.3 * reached[0]


def test_swaps_ignore_the_diagonal():
    weights, start = random_graph(64), torch.arange(64).view(8, 8)
    loops = weights + torch.diag(torch.linspace(-20, 20, 64))
    assert torch.equal(swap_rows(weights, start, seeded()), swap_rows(loops, start, seeded()))


def test_growing_takes_the_nearest_row():
    weights = torch.block_diag(*[torch.ones(4, 4)] * 5)
    order = torch.randperm(20, generator=seeded())
    members = grow_parts(weights[order][:, order], 5, seeded(1))
    assert weight_inside(weights[order][:, order], members) == 80


def test_coarse_weights_are_sums_over_groups():
    weights, groups = random_graph(30), torch.randperm(30, generator=seeded()).view(10, 3)
    expected = torch.stack([torch.stack([weights[a][:, b].sum() for b in groups]) for a in groups])
    torch.testing.assert_close(coarsen(weights, groups, chunk=4), expected)


@pytest.mark.parametrize("k, m", [(5, 8), (6, 6), (4, 3), (10, 1), (1, 8)])
def test_multilevel_parts_hold_every_row_once(k, m):
    members = multilevel_parts(random_graph(k * m), k, seeded())
    assert members.shape == (k, m) and torch.equal(members.flatten().sort().values, torch.arange(k * m))


@pytest.mark.gpu
def test_runs_on_cuda_with_generators_of_either_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    points, labels = blobs(16, 16, noise=0.05)
    for generator in (seeded(), torch.Generator("cuda").manual_seed(0)):
        found = balanced_kmeans(points.cuda(), 16, generator, starts=2)
        assert found.is_cuda and same_partition(found.cpu(), labels)
