"""Selections choose what they say, budgets are spent exactly and best, and every mistake has its own message."""

import itertools

import pytest
import torch

from moefy_hf.modeling.selection import ALLOCATIONS, SELECTIONS, allocate, count_experts, resolve_selection

EXPERTS = [8, 8, 12]  # per layer


def test_what_is_tested_is_what_exists():
    """A newcomer to the registries needs tests of its own below."""
    assert set(SELECTIONS) == {"top_k"} and set(ALLOCATIONS) == {"uniform", "sensitivity"}


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("k", range(1, 9))
def test_selections_keep_the_best(kind, k, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(k))
    selection = resolve_selection({"type": kind, "k": k}, [8])[0]
    index, used = selection(scores)
    assert index.shape == used.shape == (*shape[:-1], k) and used.dtype == torch.bool and used.all()
    for row, chosen in zip(scores.reshape(-1, 8), index.reshape(-1, k), strict=True):
        assert sorted(chosen.tolist()) == sorted(sorted(range(8), key=row.tolist().__getitem__)[-k:])
    assert selection.keeps_all(8) == (k == 8)


@pytest.mark.parametrize(
    ("k", "counts"),
    [
        (1, [1, 1, 1]),
        (8, [8, 8, 8]),
        (1.0, [8, 8, 12]),
        (0.5, [4, 4, 6]),
        (0.2, [2, 2, 2]),
        (1e-9, [1, 1, 1]),  # at least one
        ([1, 0.5, 12], [1, 4, 12]),
        ((1.0, 1.0, 1.0), [8, 8, 12]),
    ],
)
def test_k_is_a_count_a_share_or_one_of_these_per_layer(k, counts):
    assert [selection.k for selection in resolve_selection({"type": "top_k", "k": k}, EXPERTS)] == counts


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"type": "top_k", "k": 0}, "k=0 is out of range: choose 1 to 8 experts"),
        ({"type": "top_k", "k": -1}, "k=-1 is out of range"),
        ({"type": "top_k", "k": 9}, "k=9 is out of range: choose 1 to 8 experts"),
        ({"type": "top_k", "k": 0.0}, r"k=0.0 is no share of the experts: it must lie in \(0, 1\]"),
        ({"type": "top_k", "k": 1.5}, r"k=1.5 is no share.*use an integer for a count"),
        ({"type": "top_k", "k": float("nan")}, "k=nan is no share"),
        ({"type": "top_k", "k": True}, "must be an integer or a share.*got True"),
        ({"type": "top_k", "k": "half"}, "must be an integer or a share.*got 'half'"),
        ({"type": "top_k"}, "must be an integer or a share.*got None"),
        ({"k": 2}, "unknown selection None; choose from top_k"),
        ({"type": "best", "k": 2}, "unknown selection 'best'; choose from top_k"),
        (
            {"type": "top_k", "k": 2, "tau": 1, "p": 2},
            r"unknown selection settings \['p', 'tau'\]; valid: type",
        ),
        (
            {"type": "top_k", "k": 2, "allocation": "even"},
            "unknown allocation 'even'; choose from uniform, sens",
        ),
        ({"type": "top_k", "k": [2, 2]}, "k has 2 entries, one per layer is needed: 3"),
        ({"type": "top_k", "k": []}, "k has 0 entries"),
        ({"type": "top_k", "k": [2, 2, True]}, "got True"),
        ({"type": "top_k", "k": [2, 9, 2]}, "k=9 is out of range"),
        ({"type": "top_k", "k": [2, 2, 2], "allocation": "sensitivity"}, "give one k, not a list"),
        ({"type": "top_k", "k": 2, "allocation": "sensitivity"}, "call moefy_hf.allocate_budgets"),
    ],
)
def test_mistakes_are_named(selection, message):
    with pytest.raises(ValueError, match=message):
        resolve_selection(selection, EXPERTS)


def test_a_count_is_bounded_by_every_layer():
    assert count_experts(12, 12) == 12
    with pytest.raises(ValueError, match="k=12 is out of range: choose 1 to 8"):
        resolve_selection({"type": "top_k", "k": 12}, EXPERTS)


def test_sensitivity_spends_the_same_average_elsewhere():
    grid = [[1, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 12]]
    loss = [[9.0, 6.0, 3.0, 0.0], [0.3, 0.2, 0.1, 0.0], [0.3, 0.2, 0.1, 0.0]]
    chosen = resolve_selection(
        {"type": "top_k", "k": 0.5, "allocation": "sensitivity"}, EXPERTS, {"k": grid, "loss": loss}
    )
    counts = [selection.k for selection in chosen]
    assert sum(counts) == 4 + 4 + 6
    assert counts[0] == 8  # every expert of the sensitive layer


def test_sensitivity_of_another_head_is_an_error():
    """T5's encoder, taken from a converted encoder-decoder, has half of the layers that were measured."""
    measured = {"k": [[1, 8]] * 6, "loss": [[1.0, 0.0]] * 6}
    with pytest.raises(ValueError, match='measured on 6 layers, this model has 3: use allocation "uniform"'):
        resolve_selection({"type": "top_k", "k": 2, "allocation": "sensitivity"}, EXPERTS, measured)


def convex_layers(seed: int) -> tuple[list[list[int]], list[list[float]]]:
    """Two to four layers, measured at every k, with falling convex losses."""
    generator = torch.Generator().manual_seed(seed)
    grids, losses = [], []
    for _ in range(2 + seed % 3):
        experts = int(torch.randint(2, 6, (), generator=generator))
        savings = torch.rand(experts - 1, generator=generator).sort(descending=True).values.tolist()
        grids.append(list(range(1, experts + 1)))
        losses.append([sum(savings[k:]) for k in range(experts)])
    return grids, losses


@pytest.mark.parametrize("seed", range(12))
def test_allocation_is_optimal_where_losses_are_convex(seed):
    grids, losses = convex_layers(seed)
    for budget in range(len(grids), sum(map(len, grids)) + 1):
        counts = allocate(grids, losses, budget)
        assert sum(counts) == budget and all(1 <= k <= grid[-1] for k, grid in zip(counts, grids, strict=True))

        def total(counts):
            return sum(loss[k - 1] for loss, k in zip(losses, counts, strict=True))

        best = min(total(c) for c in itertools.product(*grids) if sum(c) == budget)
        assert total(counts) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_any_measured_losses_spend_the_budget_within_bounds(seed):
    """Coarse grids, noisy losses that rise in places."""
    generator = torch.Generator().manual_seed(seed)
    grids = [[1, 3, 8, 16], [2, 8], [1, 4, 5, 32], [1]]
    losses = [torch.rand(len(grid), generator=generator).tolist() for grid in grids]
    for budget in range(0, 70):
        counts = allocate(grids, losses, budget)
        assert all(grid[0] <= k <= grid[-1] for k, grid in zip(counts, grids, strict=True))
        assert sum(counts) == min(max(budget, 1 + 2 + 1 + 1), 16 + 8 + 32 + 1)


def test_a_bump_is_bridged():
    """Layer 0 saves nothing until its last expert; per expert that still is more than layer 1 ever saves."""
    grids = [[1, 2, 3, 4], [1, 2, 3, 4]]
    losses = [[9.0, 9.0, 9.0, 0.0], [2.0, 1.0, 0.5, 0.0]]
    assert allocate(grids, losses, 5) == [4, 1]


def test_equal_layers_get_equal_shares():
    grid, loss = [1, 2, 6, 16], [4.0, 2.0, 0.5, 0.0]
    for budget in range(4, 65):
        counts = allocate([grid] * 4, [loss] * 4, budget)
        assert sum(counts) == budget and max(counts) - min(counts) <= 1


def test_a_larger_budget_takes_nothing_away():
    grids, losses = convex_layers(2)
    previous = allocate(grids, losses, 0)
    for budget in range(sum(map(len, grids)) + 1):
        counts = allocate(grids, losses, budget)
        assert all(new >= old for new, old in zip(counts, previous, strict=True))
        previous = counts
