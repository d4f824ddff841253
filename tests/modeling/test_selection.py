"""Selections choose what they say, budgets are spent exactly and best, and every mistake has its own message."""

import itertools
import math

import pytest
import torch

from moefy_hf.modeling.budget_allocation import ALLOCATIONS, allocate, apportion
from moefy_hf.modeling.selection import SELECTIONS, Dynamic
from moefy_hf.modeling.selection_config import changed, count_experts, resolve_selection

EXPERTS = [8, 8, 12]  # per layer


def test_what_is_tested_is_what_exists():
    """A newcomer to the registries needs tests of its own below."""
    assert set(SELECTIONS) == {"top_k", "threshold", "top_p", "level"}
    assert set(ALLOCATIONS) == {"uniform", "sensitivity", "angular", "global"}


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
@pytest.mark.parametrize("k", range(1, 9))
def test_top_k_keeps_the_best(k, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(k))
    selection = resolve_selection({"type": "top_k", "k": k}, [8])[0]
    index, used = selection(scores)
    assert index.shape == used.shape == (*shape[:-1], k) and used.dtype == torch.bool and used.all()
    for row, chosen in zip(scores.reshape(-1, 8), index.reshape(-1, k), strict=True):
        assert sorted(chosen.tolist()) == sorted(sorted(range(8), key=row.tolist().__getitem__)[-k:])
    assert selection.keeps_all(8) == (k == 8)


DYNAMIC = {name: cls for name, cls in SELECTIONS.items() if issubclass(cls, Dynamic)}
STRENGTHS = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.0, 8.0, 0.0, 2.0]])
NOTHING = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        ({"type": "threshold", "tau": 0.0}, [[0], [1]]),
        ({"type": "threshold", "tau": 0.5}, [[0, 2], [1]]),
        ({"type": "threshold", "tau": 0.75}, [[0, 2], [1, 3]]),
        ({"type": "threshold", "tau": 1.0}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ({"type": "top_p", "p": 0.0}, [[0], [1]]),
        ({"type": "top_p", "p": 0.49}, [[0], [1]]),
        ({"type": "top_p", "p": 0.51}, [[0, 2], [1]]),
        ({"type": "top_p", "p": 0.81}, [[0, 1, 2], [1, 3]]),
        ({"type": "top_p", "p": 1.0}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ({"type": "level", "level": 0.75}, [[0], [1, 3]]),  # exp(-0.75) = 0.47
        ({"type": "level", "level": -1.0}, [[], [1]]),  # a token that skips its FFN
    ],
)
def test_dynamic_selections_by_hand(selection, kept):
    index, used = resolve_selection(selection, [4])[0](STRENGTHS)
    found = [sorted(row[use].tolist()) for row, use in zip(index, used, strict=True)]
    if selection.get("p") == 0.81:  # equals 1 and 3: the sort decides which of them comes first
        assert found[0] in ([0, 1, 2], [0, 2, 3]) and found[1] == kept[1]
    else:
        assert found == kept


@pytest.mark.parametrize("kind", DYNAMIC)
def test_no_expert_is_stronger_than_another_where_none_has_strength(kind):
    for setting, count in ((0.0, 0), (0.9, 0), (DYNAMIC[kind].highest, 4)):
        assert int(DYNAMIC[kind](setting)(NOTHING)[1].sum()) == count


@pytest.mark.parametrize("kind", DYNAMIC)
def test_a_larger_setting_only_adds_experts_and_the_order_does_not_matter(kind):
    generator = torch.Generator().manual_seed(0)
    strengths = torch.rand(50, 9, generator=generator)
    needs = DYNAMIC[kind].needs(strengths)
    order = torch.randperm(9, generator=generator)
    torch.testing.assert_close(DYNAMIC[kind].needs(strengths[:, order]), needs[:, order])
    assert (needs.argsort(-1) == strengths.argsort(-1, descending=True)).all()  # stronger experts come first


def reach_of(kind: str, layers: int = 3) -> dict:
    """Settings that compute each share, quadratically: layer 0 spends more than the others at the same setting."""
    shares = [step / 4 for step in range(5)]
    return {"share": shares, kind: [[(1 + layer) * share**2 / 9 for share in shares] for layer in range(layers)]}


@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize("shared", [0, 2])
def test_a_budget_becomes_each_layers_setting(kind, shared):
    found = resolve_selection({"type": kind, "k": 0.5}, EXPERTS, {"reach": reach_of(kind)}, shared)
    for layer, (selection, experts) in enumerate(zip(found, EXPERTS, strict=True)):
        share = (experts // 2 - shared) / (experts - shared)
        low, high = (1 + layer) * (share - 0.25) ** 2 / 9, (1 + layer) * (share + 0.25) ** 2 / 9
        assert low <= selection.threshold <= high and selection.k == experts // 2 - shared
    everything = resolve_selection({"type": kind, "k": 1.0}, EXPERTS, {"reach": reach_of(kind)}, shared)
    assert all(each.keeps_all(experts - shared) for each, experts in zip(everything, EXPERTS, strict=True))


@pytest.mark.parametrize("kind", DYNAMIC)
def test_globally_one_setting_spends_the_whole_budget(kind):
    found = resolve_selection({"type": kind, "k": 0.5, "allocation": "global"}, EXPERTS, {"reach": reach_of(kind)})
    assert len({round(selection.threshold, 6) for selection in found}) == 1
    assert sum(selection.k for selection in found) == pytest.approx(4 + 4 + 6, abs=1e-6)
    assert found[0].k > found[1].k  # of the same number of experts


@pytest.mark.parametrize("kind", DYNAMIC)
def test_settings_know_what_they_spend_once_measured(kind):
    setting = DYNAMIC[kind].name
    assert all(each.k is None for each in resolve_selection({"type": kind, setting: 0.1}, EXPERTS))
    known = resolve_selection({"type": kind, setting: 4 / 9 / 4}, EXPERTS, {"reach": reach_of(kind)})
    assert known[0].k == pytest.approx(8, abs=1.01) and known[0].k > known[1].k


@pytest.mark.parametrize(
    ("before", "changes", "after"),
    [
        ({"type": "top_k", "k": 0.2}, {"k": 3}, {"type": "top_k", "k": 3}),
        (
            {"type": "top_k", "k": 2, "allocation": "sensitivity"},
            {"k": [1, 2]},
            {"type": "top_k", "k": [1, 2], "allocation": "uniform"},
        ),
        ({"type": "top_k", "k": 2}, {"type": "threshold", "tau": 0.5}, {"type": "threshold", "tau": 0.5}),
        ({"type": "threshold", "tau": 0.5}, {"tau": 0.6}, {"type": "threshold", "tau": 0.6}),
        ({"type": "threshold", "tau": 0.5}, {"k": 2}, {"type": "threshold", "k": 2}),
        ({"type": "threshold", "tau": 0.5}, {"type": "top_p", "p": 0.5}, {"type": "top_p", "p": 0.5}),
        ({"type": "threshold", "tau": 0.5}, {"type": "top_k", "k": 2}, {"type": "top_k", "k": 2}),
        (
            {"type": "threshold", "k": 2, "allocation": "global"},
            {"type": "top_k"},
            {"type": "top_k", "k": 2},
        ),
        (
            {"type": "top_k", "k": 2, "allocation": "sensitivity"},
            {"type": "level"},
            {"type": "level", "k": 2, "allocation": "sensitivity"},
        ),
        (
            {"type": "top_k", "k": 2, "allocation": "angular"},
            {"k": [1, 2]},
            {"type": "top_k", "k": [1, 2], "allocation": "uniform"},
        ),
        (
            {"type": "top_k", "k": 2, "allocation": "angular"},
            {"type": "level"},
            {"type": "level", "k": 2, "allocation": "angular"},
        ),
    ],
)
def test_changes_leave_nothing_behind(before, changes, after):
    assert changed(before, changes) == after


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
        ({"type": ["top_k"], "k": 2}, r"unknown selection \['top_k'\]; choose from top_k, threshold"),
        ({"type": "top_k", "k": 2, "allocation": ["uniform"]}, r"unknown allocation \['uniform'\]; choose from"),
        ({"type": "level", "level": float("inf")}, "level must be a finite number, got inf"),
        ({"type": "threshold", "tau": float("nan")}, "tau must be a number from 0 to 1, got nan"),
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
        ({"type": "top_k", "k": 2, "allocation": "sensitivity"}, "call moefy_hf.allocate_budgets_"),
        ({"type": "top_k", "k": [2, 2, 2], "allocation": "angular"}, "give one k, not a list"),
        ({"type": "top_k", "k": 2, "allocation": "angular"}, 'allocate_budgets_.model, data, allocation="angular"'),
        ({"type": "threshold", "tau": 0.5, "allocation": "angular"}, "leave out the allocation 'angular'"),
        ({"type": "top_k", "k": 2, "allocation": "global"}, "'global' is one setting for all layers"),
        ({"type": "threshold", "k": 2}, "calibrate_thresholds_.*or give tau"),
        ({"type": "threshold"}, "either tau or a budget k"),
        ({"type": "threshold", "k": 2, "tau": 0.5}, "either tau or a budget k"),
        ({"type": "threshold", "tau": 1.5}, "tau must be a number from 0 to 1, got 1.5"),
        ({"type": "threshold", "tau": [0.5, 0.5]}, "tau has 2 entries, one per layer is needed: 3"),
        ({"type": "threshold", "tau": True}, "tau must be a number.*got True"),
        ({"type": "top_p", "p": -0.1}, "p must be a number from 0 to 1"),
        ({"type": "top_p", "p": 0.5, "allocation": "sensitivity"}, "leave out the allocation"),
        ({"type": "top_p", "tau": 0.5}, r"unknown selection settings \['tau'\]; valid: type, k, allocation, p"),
    ],
)
def test_mistakes_are_named(selection, message):
    with pytest.raises(ValueError, match=message):
        resolve_selection(selection, EXPERTS)


def test_shared_experts_count():
    assert [each.k for each in resolve_selection({"type": "top_k", "k": 3}, EXPERTS, shared=2)] == [1, 1, 1]
    assert resolve_selection({"type": "top_k", "k": 0.01}, [8], shared=2)[0].k == 0
    with pytest.raises(ValueError, match="k=1 is out of range: choose 2 to 8 experts, the 2 shared ones included"):
        resolve_selection({"type": "top_k", "k": 1}, EXPERTS, shared=2)


def test_reach_of_another_head_is_an_error():
    with pytest.raises(ValueError, match="measured on 2 layers, this model has 3"):
        resolve_selection({"type": "top_p", "k": 2}, EXPERTS, {"reach": reach_of("top_p", 2)})
    found = resolve_selection({"type": "top_p", "p": 0.3}, EXPERTS, {"reach": reach_of("top_p", 2)})  # needs no table
    assert [(each.threshold, each.k) for each in found] == [(0.3, None)] * 3


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(("largest", "rounded"), [(1.0, 1.0), (69.07755, 69.078)])
def test_a_setting_that_too_many_experts_share_is_not_reached(largest, rounded, allocation):
    half = [0.1, 0.2, 0.4, rounded, rounded, rounded, rounded, rounded]  # most experts have no strength
    reach = {"share": [step / 7 for step in range(8)], "level": [half] * 3}
    found = resolve_selection({"type": "level", "k": 0.75, "allocation": allocation}, EXPERTS, {"reach": reach})
    for each, experts in zip(found, EXPERTS, strict=True):
        assert 0.9 * largest < each.threshold < largest
        assert 2 / 7 * experts < each.k < 3 / 7 * experts + 1e-9
    everything = resolve_selection({"type": "level", "k": 1.0, "allocation": allocation}, EXPERTS, {"reach": reach})
    assert all(each.keeps_all(experts) for each, experts in zip(everything, EXPERTS, strict=True))


@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_strengths_select_as_their_values_do(kind, dtype):
    strengths = torch.rand(200, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    strengths[:3] = 0
    for setting in (0.5, 0.75, 1.0):
        _, used = DYNAMIC[kind](setting)(strengths)
        assert torch.equal(used, DYNAMIC[kind](setting)(strengths.float())[1])


def test_a_count_is_bounded_by_every_layer():
    assert count_experts(12, 12) == 12
    with pytest.raises(ValueError, match="k=12 is out of range: choose 1 to 8"):
        resolve_selection({"type": "top_k", "k": 12}, EXPERTS)


def test_sensitivity_spends_the_same_average_elsewhere():
    grid = [[1, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 12]]
    loss = [[9.0, 6.0, 3.0, 0.0], [0.3, 0.2, 0.1, 0.0], [0.3, 0.2, 0.1, 0.0]]
    chosen = resolve_selection(
        {"type": "top_k", "k": 0.5, "allocation": "sensitivity"}, EXPERTS, {"sensitivity": {"k": grid, "loss": loss}}
    )
    counts = [selection.k for selection in chosen]
    assert sum(counts) == 4 + 4 + 6
    assert counts[0] == 8  # every expert of the sensitive layer


def test_sensitivity_of_another_head_is_an_error():
    """T5's encoder, taken from a converted encoder-decoder, has half of the layers that were measured."""
    measured = {"sensitivity": {"k": [[1, 8]] * 6, "loss": [[1.0, 0.0]] * 6}}
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


DISTANCES = [0.3, 0.1, 0.2, 0.18]  # of these, 13.1072 (I - 0.195) is 1.376, -1.245, 0.066, -0.197
KEPT = [0.7984, 0.2235, 0.5164, 0.4510]  # and this is the sigmoid; the mean is 0.4973


def by_angle(k, experts, shared=0, distances=DISTANCES) -> list[int]:
    selection, measured = {"type": "top_k", "k": k, "allocation": "angular"}, {"angular": {"distance": distances}}
    return [each.k + shared for each in resolve_selection(selection, experts, measured, shared)]


def test_angles_decide_what_is_kept_as_in_cfsp():
    for distance, kept in zip(DISTANCES, KEPT, strict=True):
        assert 1 / (1 + math.exp(-13.1072 * (distance - 0.195))) == pytest.approx(kept, abs=1e-4)
    counts = by_angle(0.3, [1000] * 4)  # 300 a layer: 0.3 / 0.4973 of each of these
    assert counts == pytest.approx([1000 * kept * 0.3 / 0.49733 for kept in KEPT], abs=1) and sum(counts) == 1200


def test_a_layer_that_would_keep_more_than_all_keeps_all():
    counts = by_angle(0.7, [1000] * 4)  # the first would keep 1124
    left = sum(KEPT[1:])
    assert counts == pytest.approx([1000, *(1800 * kept / left for kept in KEPT[1:])], abs=1)
    assert sum(counts) == 2800


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("k", [0.01, 3, 0.25, 0.5, 0.8, 0.99, 1.0])
def test_angles_spend_the_budget_within_bounds(k, shared):
    for experts in ([16] * 4, [16, 32, 8, 8]):
        counts = by_angle(k, experts, shared)
        assert sum(counts) == sum(count_experts(k, e, shared) for e in experts)
        assert all(max(1, shared) <= each <= e for each, e in zip(counts, experts, strict=True))
        if len(set(experts)) == 1:
            assert counts[0] >= counts[2] >= counts[3] >= counts[1]  # in the order of the distances


def test_extreme_angles_spend_the_budget():
    assert by_angle(0.5, [8, 8, 8], distances=[1.0, 0.0, 0.0]) == [8, 2, 2]
    assert by_angle(0.25, [8, 8, 8], distances=[1.0, 0.0, 0.0]) == [4, 1, 1]
    assert by_angle(0.5, [8, 8, 8], distances=[0.2] * 3) == [4, 4, 4]


def test_angles_of_another_head_are_an_error():
    with pytest.raises(ValueError, match='"angular" needs was measured on 4 layers, this model has 3: use allocation'):
        by_angle(0.5, EXPERTS)


@pytest.mark.parametrize("seed", range(6))
def test_experts_are_apportioned_by_rounding(seed):
    """Some factor turns weights into counts, by rounding to the nearest within bounds."""
    generator = torch.Generator().manual_seed(seed)
    experts, weights = [16, 16, 40, 8], torch.rand(4, generator=generator).add(0.05).tolist()
    for budget in range(8, sum(experts) + 1):
        counts = apportion(weights, experts, 2, budget)
        assert sum(counts) == budget
        low = max([(k - 0.5) / w for k, w in zip(counts, weights, strict=True) if k > 2], default=0)
        high = min([(k + 0.5) / w for k, w, e in zip(counts, weights, experts, strict=True) if k < e], default=1e9)
        assert low <= high


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
