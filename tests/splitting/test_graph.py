"""The co-activation graph and its partition: weights against a loop, exact sizes, planted parts, the repair, METIS."""

import builtins
import itertools

import pytest
import torch

from moefy_hf.splitters import graph
from moefy_hf.splitters.graph import (
    KINDS,
    METHODS,
    coactivation_matrix,
    metis_partition,
    partition_graph,
    repair_sizes,
    strongest_edges,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=METHODS)
def method(request) -> str:
    if request.param == "metis":
        pytest.importorskip("pymetis")
    return request.param


@pytest.fixture
def warnings_seen(monkeypatch) -> list[str]:
    """What the module warns about."""
    seen: list[str] = []
    monkeypatch.setattr(graph.logger, "warning_once", seen.append, raising=False)
    return seen


def random_graph(f: int, seed: int = 0) -> torch.Tensor:
    """(f, f): heavy-tailed weights, half of them zero, as co-activations of sparse neurons are."""
    weights = torch.rand(f, f, generator=seeded(seed))
    weights = torch.where(weights > 0.3, weights.pow(12) * 1e3, 0.0)
    return (weights + weights.T).fill_diagonal_(0)


def planted(k: int, m: int, noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A graph of k groups with strong edges inside, weak ones of share `noise` between, and the groups' labels."""
    generator = seeded(seed)
    labels = torch.arange(k).repeat_interleave(m)[torch.randperm(k * m, generator=generator)]
    inside = (labels[:, None] == labels) * (0.5 + torch.rand(k * m, k * m, generator=generator))
    weights = inside + noise * torch.rand(k * m, k * m, generator=generator)
    return (weights + weights.T).fill_diagonal_(0), labels


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a[:, None] == a, b[:, None] == b)


def inside(weights: torch.Tensor, labels: torch.Tensor) -> float:
    return weights[labels[:, None] == labels].sum().item()


# weights


@pytest.mark.parametrize("kind", KINDS)
def test_coactivation_against_a_loop(kind):
    neurons = torch.randn(11, 5, generator=seeded())
    expected = torch.zeros(5, 5)
    for token, n, m in itertools.product(range(11), range(5), range(5)):
        h_n, h_m = neurons[token, n].item(), neurons[token, m].item()
        if n != m and h_n > 0 and h_m > 0:
            expected[n, m] += h_n * h_m if kind == "product" else 1
    torch.testing.assert_close(coactivation_matrix([neurons], 5, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_coactivation_does_not_depend_on_the_chunks(kind):
    neurons = torch.randn(50, 12, generator=seeded())
    whole = coactivation_matrix([neurons], 12, kind)
    torch.testing.assert_close(coactivation_matrix(iter(neurons.split(7)), 12, kind), whole)
    assert torch.equal(whole, whole.T) and (whole.diagonal() == 0).all()


def test_coactivation_keeps_low_precision_chunks_and_their_owner_intact():
    neurons = (torch.rand(3000, 4, generator=seeded()) + 0.5).bfloat16().requires_grad_()
    before = neurons.detach().clone()
    counts = coactivation_matrix([neurons], 4, "count")
    assert counts.dtype == torch.float32 and not counts.requires_grad
    assert (counts == 3000 * (1 - torch.eye(4))).all()  # bfloat16 sums would stop at 256
    assert torch.equal(neurons, before)


@pytest.mark.parametrize(
    "chunks, kind, message",
    [
        ([], "product", "no activations"),
        ([torch.zeros(3, 5)], "product", r"\(T, 4\).*\(3, 5\)"),
        ([torch.zeros(4)], "product", r"\(T, 4\)"),
        ([torch.zeros(2, 4)], "cosine", "'cosine'.*product, count"),
    ],
)
def test_coactivation_refuses(chunks, kind, message):
    with pytest.raises(ValueError, match=message):
        coactivation_matrix(chunks, 4, kind)


# partition


@pytest.mark.parametrize("f, k", [(1, 1), (6, 6), (8, 1), (30, 5), (96, 3), (128, 16), (63, 9)])
def test_sizes_are_equal(method, f, k):
    labels = partition_graph(random_graph(f), k, seeded(), method=method)
    assert labels.dtype == torch.long and labels.shape == (f,)
    assert torch.bincount(labels, minlength=k).tolist() == [f // k] * k


@pytest.mark.parametrize("weights", [torch.zeros(24, 24), torch.ones(24, 24), torch.eye(24)])
def test_graphs_without_structure(method, weights):
    assert torch.bincount(partition_graph(weights, 6, seeded(), method=method)).tolist() == [4] * 6


def test_same_seed_same_labels_other_seeds_may_differ(method):
    weights = random_graph(160)
    first, again, other = (partition_graph(weights, 16, seeded(seed), method=method) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not same_partition(first, other)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("k, m", [(4, 8), (9, 7), (12, 24)])
def test_recovers_planted_groups_in_any_order_and_scale(method, k, m, noise):
    weights, labels = planted(k, m, noise)
    assert same_partition(partition_graph(weights, k, seeded(), method=method), labels)
    order = torch.randperm(k * m, generator=seeded(5))
    shuffled = partition_graph(weights[order][:, order] * 1e6, k, seeded(), method=method)
    assert same_partition(shuffled, labels[order])


def test_heavy_edges_do_not_hide_the_rest(method):
    """One edge outweighs all others together, as products of activations do; the groups must still be found."""
    weights, labels = planted(8, 16)
    i, j = (labels == 0).nonzero()[:2, 0]
    weights[i, j] = weights[j, i] = 1e6
    assert same_partition(partition_graph(weights, 8, seeded(), method=method), labels)


def test_loops_and_the_caller_s_matrix_are_left_alone(method):
    weights = random_graph(64)
    before = weights.clone()
    labels = partition_graph(weights, 8, seeded(), method=method)
    assert torch.equal(weights, before)
    if method == "metis":  # growing takes loops for norms; METIS and swaps do not see them
        loops = weights + torch.diag(torch.rand(64, generator=seeded()) * 100)
        assert torch.equal(partition_graph(loops, 8, seeded(), method=method), labels)


def test_holds_more_weight_than_random_parts_and_than_metis_alone(method):
    weights = random_graph(160)
    found = inside(weights, partition_graph(weights, 16, seeded(), method=method))
    random = [inside(weights, torch.randperm(160, generator=seeded(s)) % 16) for s in range(20)]
    assert found > 2 * max(random)
    if method == "metis":
        assert found > inside(weights, repair_sizes(weights, metis_partition(weights, 16, seeded()), 16))


def test_few_edges_are_enough_for_metis():
    pytest.importorskip("pymetis")
    weights, labels = planted(8, 16, noise=0.3)
    assert same_partition(partition_graph(weights, 8, seeded(), method="metis", edges_per_neuron=8), labels)


def test_default_needs_no_metis(monkeypatch, warnings_seen):
    without_pymetis(monkeypatch)
    weights = random_graph(64)
    default = partition_graph(weights, 8, seeded())
    assert torch.equal(default, partition_graph(weights, 8, seeded(), method="multilevel")) and not warnings_seen


def test_metis_absent_warns_and_partitions_all_the_same(monkeypatch, warnings_seen):
    without_pymetis(monkeypatch)
    weights, labels = planted(6, 8)
    assert same_partition(partition_graph(weights, 6, seeded(), method="metis"), labels)
    assert len(warnings_seen) == 1 and "pip install pymetis" in warnings_seen[0] and "multilevel" in warnings_seen[0]
    with pytest.raises(ImportError):
        metis_partition(weights, 6, seeded())


def without_pymetis(monkeypatch) -> None:
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "pymetis":
            raise ImportError("No module named 'pymetis'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize(
    "weights, k, options, message",
    [
        (torch.zeros(10, 10), 3, {}, "10 neurons .* 3 parts"),
        (torch.zeros(10, 10), 0, {}, "0 parts"),
        (torch.zeros(0, 0), 1, {}, "0 neurons"),
        (torch.zeros(4, 6), 2, {}, "square"),
        (torch.zeros(4, 4, dtype=torch.long), 2, {}, "floating-point"),
        (-torch.ones(4, 4), 2, {}, "non-negative"),
        (torch.full((4, 4), torch.nan), 2, {}, "finite"),
        (torch.full((4, 4), torch.inf), 2, {}, "finite"),
        (torch.ones(4, 4).triu(), 2, {}, "symmetric"),
        (torch.zeros(4, 4), 2, {"method": "spectral"}, "'spectral'.*multilevel, metis"),
    ],
)
def test_refuses(weights, k, options, message):
    with pytest.raises(ValueError, match=message):
        partition_graph(weights, k, seeded(), **options)


# METIS's input and the repair of its output


@pytest.mark.parametrize("keep", [1, 3, 100])
def test_strongest_edges_are_those_of_either_end_both_ways(keep):
    weights = random_graph(20)
    rows, columns, values = strongest_edges(weights, keep)
    expected = set()
    for i in range(20):
        for j in weights[i].argsort(descending=True)[:keep].tolist():
            if weights[i, j] > 0:
                expected |= {(i, j), (j, i)}
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == sorted(expected)
    assert torch.equal(values, weights[rows, columns])


def test_repair_moves_the_neurons_that_lose_least():
    """Neurons 0-3 in part 0, 4-5 in part 1: one must move. 2 is tied to 0, 1 and weakly to 4; 3 to nothing but 5."""
    weights = torch.zeros(6, 6)
    for i, j, weight in [(0, 1, 5.0), (0, 2, 4.0), (1, 2, 4.0), (0, 3, 1.0), (2, 4, 3.0), (3, 5, 0.5), (4, 5, 5.0)]:
        weights[i, j] = weights[j, i] = weight
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert repair_sizes(weights, labels, 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert labels.tolist() == [0, 0, 0, 0, 1, 1]
    # 1.0 lost and 0.5 won; cheaper than the 5.0 that moving 2 would cost, until its tie to part 1 makes up for it
    weights[2, 4] = weights[4, 2] = 7.6
    assert repair_sizes(weights, labels, 2).tolist() == [0, 0, 1, 0, 1, 1]
    # loops stay inside wherever their neuron goes
    weights[2, 2] = 100
    assert repair_sizes(weights, labels, 2).tolist() == [0, 0, 1, 0, 1, 1]


def test_repair_picks_the_best_part_and_counts_moves_already_made():
    """Part 0 has two too many, parts 1 and 2 room for one each; 2 and 3 want to stay together, but cannot."""
    weights = torch.zeros(9, 9)
    for i, j, weight in [(0, 1, 9.0), (1, 4, 9.0), (0, 4, 9.0), (2, 3, 1.0), (2, 5, 4.0), (3, 5, 3.0), (3, 7, 1.0)]:
        weights[i, j] = weights[j, i] = weight
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2])
    assert repair_sizes(weights, labels, 3).tolist() == [0, 0, 1, 2, 0, 1, 1, 2, 2]


def test_repair_of_any_sizes():
    weights = random_graph(60)
    for labels in (torch.zeros(60, dtype=torch.long), torch.arange(60).clamp_max(5), torch.arange(60) % 6):
        repaired = repair_sizes(weights, labels, 6)
        assert torch.bincount(repaired, minlength=6).tolist() == [10] * 6
    assert torch.equal(repaired, labels)  # the last was in order
