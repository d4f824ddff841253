"""Every registered splitter returns equal parts, the same ones under a seed, and finds groups that were planted."""

import copy

import pytest
import torch
from batches import text_batches
from tiny import tiny_model
from torch import nn

from moefy_hf import profile
from moefy_hf.measure.profile import SiteProfile
from moefy_hf.modeling.ffn_sites import FfnWeights, find_sites
from moefy_hf.splitters import SPLITTERS
from moefy_hf.splitters.activation_markers import marked


def weights_of(neurons: int, width: int = 16, gated: bool = False, seed: int = 0) -> FfnWeights:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gate = (noise(neurons, width), noise(neurons)) if gated else (None, None)
    return FfnWeights(noise(neurons, width), noise(width, neurons), nn.ReLU(), noise(neurons), *gate)


def profile_of(weights: FfnWeights, tokens: int = 300, inputs: torch.Tensor | None = None) -> SiteProfile:
    stats = SiteProfile(weights.down.shape[1])
    if inputs is None:
        inputs = torch.randn(tokens, weights.down.shape[0], generator=torch.Generator().manual_seed(9))
    stats.inputs = inputs
    for _, neurons in stats.activations(weights):
        stats.update_(neurons)
    return stats


def split(name: str, weights: FfnWeights, experts: int, stats: SiteProfile | None = None, seed: int = 0):
    stats = stats or profile_of(weights)
    return SPLITTERS[name].order(weights, stats, experts, torch.Generator().manual_seed(seed))


def groups(order: torch.Tensor, experts: int) -> set[frozenset[int]]:
    return {frozenset(part.tolist()) for part in order.view(experts, -1)}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("neurons", "experts"), [(48, 6), (48, 1), (48, 48), (45, 5), (49, 7), (64, 32), (2, 2), (1, 1)]
)
@pytest.mark.parametrize("name", SPLITTERS)
def test_a_permutation_of_all_neurons(name, neurons, experts, gated):
    order = split(name, weights_of(neurons, gated=gated), experts)
    assert order.dtype == torch.int64 and order.shape == (neurons,)
    assert order.sort().values.tolist() == list(range(neurons))


@pytest.mark.parametrize("name", SPLITTERS)
def test_the_seed_decides(name):
    weights = weights_of(64)
    stats = profile_of(weights)
    torch.manual_seed(1)
    first = split(name, weights, 8, stats, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, split(name, weights, 8, stats, seed=3))


def test_another_seed_is_another_random_split():
    weights = weights_of(64)
    assert groups(split("random", weights, 8, seed=0), 8) != groups(split("random", weights, 8, seed=1), 8)
    order = split("random", weights, 8)
    assert (order.view(8, 8).sort(1).values.diff() > 1).any()  # no contiguous blocks


@pytest.mark.parametrize("name", SPLITTERS)
def test_nothing_is_modified(name):
    weights = weights_of(48, gated=True)
    stats = profile_of(weights)
    before, sums = copy.deepcopy(weights), stats.mass.clone()
    inputs = stats.inputs.clone()
    split(name, weights, 6, stats)
    for field in ("up", "down", "up_bias", "gate", "gate_bias"):
        assert torch.equal(getattr(weights, field), getattr(before, field))
    assert torch.equal(stats.inputs, inputs) and torch.equal(stats.mass, sums)


@pytest.mark.parametrize("name", [name for name, splitter in SPLITTERS.items() if splitter.needs_profile])
def test_data_are_asked_for(name):
    with pytest.raises(ValueError, match=f"{name}.*calibration"):
        SPLITTERS[name].order(weights_of(48), None, 6, torch.Generator())


@pytest.mark.parametrize("name", [name for name, splitter in SPLITTERS.items() if not splitter.needs_profile])
def test_no_data_are_needed(name):
    weights = weights_of(48)
    order = SPLITTERS[name].order(weights, None, 6, torch.Generator().manual_seed(0))
    assert torch.equal(order, split(name, weights, 6))


@pytest.mark.parametrize("name", SPLITTERS)
def test_degenerate_neurons(name):
    """Neurons that are equal, are zero, or never fire."""
    weights = weights_of(48)
    weights.up[:20] = weights.up[0]
    weights.up[20:30] = 0
    weights.up_bias[20:40] = -1000
    weights.up_bias[40:] = 0
    weights.up[40:] = 0
    assert split(name, weights, 6).sort().values.tolist() == list(range(48))
    silent = FfnWeights(weights.up, weights.down, nn.ReLU(), torch.full((48,), -1000.0))
    assert split(name, silent, 6).sort().values.tolist() == list(range(48))


@pytest.mark.parametrize("model", ["bert", "gpt2", "phi3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPLITTERS)
def test_weights_of_real_models(name, dtype, model):
    """Views of parameters that require gradients, transposed and fused layouts, half precision."""
    model = tiny_model(model).to(dtype)
    with profile(model, text_batches(8), progress=False) as found:
        for site, stats in zip(find_sites(model), found.sites, strict=True):
            order = split(name, site.weights(), 6, stats)
            assert order.sort().values.tolist() == list(range(48)) and not order.requires_grad


# ---- planted groups


def planted(experts: int, size: int, seed: int) -> torch.Tensor:
    """(f,) the group of each neuron, shuffled."""
    labels = torch.arange(experts).repeat_interleave(size)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def groups_of(labels: torch.Tensor) -> set[frozenset[int]]:
    return {frozenset((labels == label).nonzero().flatten().tolist()) for label in labels.unique()}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("experts", "size"), [(4, 8), (8, 8), (12, 5), (16, 2)])
def test_parameter_clustering_finds_rows_of_one_direction(experts, size, gated):
    """Whatever their length, their bias and `down`; in a gated FFN by the gate alone."""
    labels = planted(experts, size, seed=experts)
    generator = torch.Generator().manual_seed(size)
    directions = torch.linalg.qr(torch.randn(32, experts, generator=generator))[0].T
    rows = directions[labels] + 0.05 * torch.randn(len(labels), 32, generator=generator)
    rows *= torch.rand(len(labels), 1, generator=generator) * 5 + 0.1
    weights = weights_of(len(labels), width=32, gated=gated)
    (weights.gate if gated else weights.up).copy_(rows)
    found = [groups(split("parameter_clustering", weights, experts, seed=seed), experts) for seed in range(3)]
    assert found == [groups_of(labels)] * 3


def firing_together(experts: int, size: int, gated: bool) -> tuple[FfnWeights, SiteProfile, torch.Tensor]:
    """Neurons of a group fire on the same tokens, though their rows have nothing else in common."""
    labels = planted(experts, size, seed=1)
    generator = torch.Generator().manual_seed(2)
    width = 3 * experts
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].T
    topics, rest = basis[:experts], basis[experts:]  # tokens have topics; the rest of a row they never see
    fires = (labels[:, None] == torch.arange(experts)).float() * 2 - 1  # (f, E)
    fires += 0.3 * torch.randn(fires.shape, generator=generator)
    rows = fires @ topics + 10 * torch.randn(len(labels), len(rest), generator=generator) @ rest
    weights = weights_of(len(labels), width, gated)
    weights.up_bias.zero_()
    (weights.gate if gated else weights.up).copy_(rows)
    if gated:
        weights.gate_bias.zero_()
        weights.up.zero_()
        weights.up_bias.fill_(1)
    topic = torch.randint(experts, (400,), generator=generator)
    inputs = topics[topic] * (1 + torch.rand(400, 1, generator=generator))
    return weights, profile_of(weights, inputs=inputs), labels


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("experts", "size"), [(4, 8), (8, 8), (6, 5)])
def test_coactivation_finds_neurons_that_fire_together(experts, size, gated):
    weights, stats, labels = firing_together(experts, size, gated)
    found = [groups(split("coactivation", weights, experts, stats, seed=seed), experts) for seed in range(3)]
    assert found == [groups_of(labels)] * 3


def test_rows_alone_would_not_tell_which_neurons_fire_together():
    """Or the test above would not be about co-activation."""
    weights, stats, labels = firing_together(8, 8, gated=False)
    assert groups(split("parameter_clustering", weights, 8, stats), 8) != groups_of(labels)


def alike(scale: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[FfnWeights, SiteProfile]:
    """An ungated linear FFN whose neuron i answers with +-1 or +-0.1, signs without any order, times scale[i]: with 1
    on the tokens of its group, of which there are as many as groups."""
    generator = torch.Generator().manual_seed(seed)
    count = int(labels.max()) + 1
    answers = torch.where(labels[:, None] == torch.arange(count), 1.0, 0.1)  # (f, E)
    answers *= 1 + 0.05 * torch.randn(answers.shape, generator=generator)
    answers *= torch.randint(2, answers.shape, generator=generator) * 2 - 1
    up = (answers * scale[:, None]).contiguous()  # tokens are unit vectors
    inputs = torch.eye(count).repeat(8, 1)
    lengths = torch.randn(count, len(labels), generator=generator)
    weights = FfnWeights(up, lengths / lengths.norm(dim=0), nn.Identity())
    return weights, profile_of(weights, inputs=inputs)


@pytest.mark.parametrize(("experts", "size"), [(4, 10), (8, 10)])
def test_activation_markers_find_neurons_that_peak_together(experts, size):
    """By the tokens' largest |activations|, ten of them, whatever their sign."""
    labels = planted(experts, size, seed=1)
    weights, stats = alike(torch.ones(len(labels)), labels, seed=2)
    found = [groups(split("activation_markers", weights, experts, stats, seed=seed), experts) for seed in range(3)]
    assert found == [groups_of(labels)] * 3
    assert groups(split("coactivation", weights, experts, stats), experts) != groups_of(labels)  # signs mislead it


def test_markers_are_the_tens_largest():
    neurons = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    marks = marked(neurons)
    assert marks.shape == neurons.shape and set(marks.unique().tolist()) == {0.0, 1.0}
    assert (marks.sum(-1) == 10).all()
    for token, row in zip(neurons.abs(), marks.bool(), strict=True):
        assert token[row].min() > token[~row].max()
    assert torch.equal(marked(neurons[:, :7]), torch.ones(50, 7))


@pytest.mark.parametrize(("experts", "size"), [(4, 8), (8, 10), (6, 5)])
def test_output_aware_weighs_neurons_by_their_columns_of_down(experts, size):
    """Activations of all magnitudes, and columns of `down` that undo that: only products say what goes together."""
    labels = planted(experts, size, seed=1)
    scale = 10 ** torch.empty(len(labels)).uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    plain, _ = alike(torch.ones(len(labels)), labels, seed=2)
    weights = FfnWeights(plain.up * scale[:, None], plain.down / scale, plain.act)
    stats = profile_of(weights, inputs=torch.eye(experts).repeat(8, 1))
    found = [groups(split("output_aware", weights, experts, stats, seed=seed), experts) for seed in range(3)]
    assert found == [groups_of(labels)] * 3
    lengths_ignored = FfnWeights(weights.up, plain.down, plain.act)
    assert groups(split("output_aware", lengths_ignored, experts, stats), experts) != groups_of(labels)


def test_output_aware_does_not_depend_on_how_a_neuron_is_scaled():
    """c * activation and down / c are the same neuron."""
    weights = weights_of(64)
    weights.up_bias.zero_()
    inputs = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([0.25, 0.5, 1.0, 2.0]).repeat(16)
    other = FfnWeights(weights.up * scale[:, None], weights.down / scale, weights.act)
    found = [split("output_aware", each, 8, profile_of(each, inputs=inputs)) for each in (weights, other)]
    assert groups(found[0], 8) == groups(found[1], 8)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("experts", "size"), [(4, 8), (12, 5)])
def test_gate_clustering_finds_rows_that_lie_together(experts, size, gated):
    """Two groups of one direction differ by their rows' length, which normalised rows do not show."""
    labels = planted(experts, size, seed=experts)
    generator = torch.Generator().manual_seed(size)
    directions = torch.linalg.qr(torch.randn(32, experts, generator=generator))[0].T
    directions[1] = 4 * directions[0]
    rows = directions[labels] + 0.05 * torch.randn(len(labels), 32, generator=generator)
    weights = weights_of(len(labels), width=32, gated=gated)
    (weights.gate if gated else weights.up).copy_(rows)
    found = [groups(split("gate_clustering", weights, experts, seed=seed), experts) for seed in range(3)]
    assert found == [groups_of(labels)] * 3
    assert groups(split("parameter_clustering", weights, experts), experts) != groups_of(labels)


@pytest.mark.parametrize("name", [name for name, splitter in SPLITTERS.items() if name != "random"])
def test_the_order_of_neurons_does_not_matter(name):
    """Neurons that come in another order form the same groups."""
    labels = planted(4, 10, seed=1)
    generator = torch.Generator().manual_seed(2)
    directions = torch.linalg.qr(torch.randn(16, 4, generator=generator))[0].T
    rows = directions[labels] + 0.02 * torch.randn(40, 16, generator=generator)
    weights = FfnWeights(rows, torch.eye(16).repeat(1, 3)[:, :40], nn.ReLU())
    inputs = directions[torch.randint(4, (200,), generator=generator)] * 2
    order = torch.randperm(40, generator=generator)
    moved = FfnWeights(weights.up[order], weights.down[:, order], weights.act)
    found = groups(split(name, weights, 4, profile_of(weights, inputs=inputs)), 4)
    after = groups(order[split(name, moved, 4, profile_of(moved, inputs=inputs))], 4)
    assert found == after == groups_of(labels)


def test_coactivation_does_not_depend_on_chunks(monkeypatch):
    weights, stats, _ = firing_together(8, 8, gated=False)
    whole = groups(split("coactivation", weights, 8, stats), 8)
    monkeypatch.setattr("moefy_hf.measure.sample.CHUNK", 7)
    assert groups(split("coactivation", weights, 8, stats), 8) == whole


@pytest.mark.parametrize("name", ["parameter_clustering", "coactivation"])
def test_a_warm_start_is_kept_where_nothing_is_better(name):
    """Neurons lie in experts that no swap improves, found with another seed: the search from them cannot end worse."""
    weights = weights_of(96)
    order = split(name, weights, 8, seed=1)
    placed = FfnWeights(
        weights.up[order], weights.down[:, order], weights.act, weights.up_bias[order], weights.gate, weights.gate_bias
    )
    stats = profile_of(placed)
    quality = {}
    for warm in (False, True):
        again = SPLITTERS[name].order(placed, stats, 8, torch.Generator().manual_seed(5), warm)
        assert again.sort().values.tolist() == list(range(96))
        if name == "coactivation":
            fired = torch.cat([neurons for _, neurons in stats.activations(placed)]).relu()
            ties = fired.T @ fired
            ties.fill_diagonal_(0)
        else:
            rows = nn.functional.normalize(placed.keys, dim=-1)
            ties = rows @ rows.T
        quality[warm] = [float(sum(ties[part][:, part].sum() for part in each.view(8, -1))) for each in (again,)][0]
    kept = float(sum(ties[part][:, part].sum() for part in torch.arange(96).view(8, -1)))
    assert quality[True] >= max(quality[False], kept) * (1 - 1e-4)
    assert quality[True] > kept * (1 - 1e-4)
