"""Experts of later layers get the numbers of those they are used together with, and everything that asks a pre-gated
router outside a forward pass asks it what the first layer reads."""

import copy

import pytest
import torch
from batches import text_batches
from tiny import convert, tiny_model

from moefy_hf import (
    MoEficationConfig,
    allocate_budgets_,
    calibrate_thresholds_,
    compensate_,
    evaluate,
    fit_routers_,
    moefy_,
    profile,
    reroute_,
)
from moefy_hf.analysis import prune
from moefy_hf.conversion import pipeline
from moefy_hf.conversion.compensation import means_of_dropped
from moefy_hf.conversion.expert_matching import correlation, matched_orders
from moefy_hf.conversion.fit_routers import _mean_shares
from moefy_hf.conversion.permute import permute_neurons_
from moefy_hf.evaluation.local_figures import local_figures
from moefy_hf.evaluation.sweep_points import SweepPoint
from moefy_hf.measure.contexts import selecting
from moefy_hf.measure.flops import ffn_flops, model_flops, routed_flops
from moefy_hf.measure.metrics import Quality, predictions
from moefy_hf.modeling.ffn_sites import find_sites

EXPERTS, SIZE, WIDTH, LAYERS = 6, 8, 16, 3
BATCHES = text_batches(30, rows=8, length=16)


def blocks(order: torch.Tensor) -> torch.Tensor:
    """(E,) experts in an order -> (f,) their neurons."""
    return torch.arange(EXPERTS * SIZE).view(EXPERTS, SIZE)[order].flatten()


def planted(shared: int = 0, head: str = "AutoModel"):
    """A ReLU OPT that reads nearly the same in every layer, for attention and FFNs add next to nothing; its experts
    fire along directions, the same in all layers, in another order in each.

    Returns:
        the model, and for each layer the expert of the first layer that each of its experts is.
    """
    torch.manual_seed(0)
    model = tiny_model(
        "opt", head, num_hidden_layers=LAYERS, ffn_dim=EXPERTS * SIZE, activation_function="relu", enable_bias=True
    )
    directions = torch.linalg.qr(torch.randn(WIDTH, EXPERTS))[0].T.repeat_interleave(SIZE, 0)  # (f, d)
    rows = 3 * (directions + 0.02 * torch.randn(EXPERTS * SIZE, WIDTH))
    permutations = []
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.fill_(1 if name.endswith("weight") else 0)
            if "out_proj" in name:
                param.mul_(0.01)
        for number, site in enumerate(find_sites(model)):
            site.up.weight.copy_(rows)
            site.up.bias.fill_(-2)
            site.down.weight.normal_(std=0.01)
            site.down.bias.zero_()
            order = torch.cat([torch.arange(shared), shared + torch.randperm(EXPERTS - shared)])
            order = torch.arange(EXPERTS) if number == 0 else order
            permute_neurons_(site, blocks(order))
            permutations.append(order)
    assert len({tuple(order.tolist()) for order in permutations}) == LAYERS
    return model, permutations


def as_they_lie(**changes) -> MoEficationConfig:
    selection = {"type": "top_k", "k": 1, "allocation": "uniform"}
    return MoEficationConfig(num_experts=EXPERTS, router="pre_gated", **({"selection": selection} | changes))


@pytest.fixture
def lying(monkeypatch):
    """A splitter that leaves neurons where they are."""
    splitters = dict(pipeline.SPLITTERS)
    kind = type(splitters["random"])
    splitters["random"] = kind(lambda weights, *_: torch.arange(weights.down.shape[1]), needs_profile=False)
    monkeypatch.setattr(pipeline, "SPLITTERS", splitters)


def test_correlation_is_that_of_columns():
    a, b = torch.rand(9000, 3), torch.rand(9000, 4)
    b[:, 1] += a[:, 2]
    b[:, 3] = 5  # never changes
    found = correlation(a, b)
    expected = torch.corrcoef(torch.cat([a, b[:, :3]], 1).T)[:3, 3:]
    torch.testing.assert_close(found[:, :3].float(), expected, rtol=1e-4, atol=1e-5)
    assert (found[:, 3] == 0).all()


@pytest.mark.parametrize("shared", [0, 2])
def test_a_planted_permutation_is_found(shared):
    model, permutations = planted(shared)
    sites = find_sites(model)
    weights = copy.deepcopy(model.state_dict())
    neurons = [torch.arange(EXPERTS * SIZE)] * LAYERS
    with profile(model, BATCHES, progress=False) as found:
        orders = matched_orders("pre_gated", sites, neurons, [EXPERTS] * LAYERS, found, shared)
        for order, permutation in zip(orders, permutations, strict=True):
            assert torch.equal(order, blocks(permutation.argsort()))
        # the same of experts that a split has found elsewhere, their neurons in the order that it gives
        turned = [blocks(torch.arange(EXPERTS).roll(1)).view(EXPERTS, SIZE).flip(1).flatten()] * LAYERS
        if not shared:
            again = matched_orders("pre_gated", sites, turned, [EXPERTS] * LAYERS, found, 0)
            for order, permutation in zip(again, permutations, strict=True):
                expected = blocks(permutation.argsort().roll(1)).view(EXPERTS, SIZE).flip(1).flatten()
                assert torch.equal(order, expected)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_encoder_and_decoder_are_aligned_by_themselves():
    model = tiny_model("t5", "AutoModelForSeq2SeqLM")
    before = [site.weights() for site in find_sites(copy.deepcopy(model))]
    batches = text_batches(40, rows=8, length=16, labels="seq2seq")
    report = moefy_(model, as_they_lie(), batches, progress=False)
    leaders = [site.act.router.leader for site in model.moe_sites()]
    assert leaders[0] is leaders[1] is not leaders[2] is leaders[3] and len(report.fits) == 4
    assert sum(".router." in key for key in model.state_dict()) == 2
    assert report.fits[0].best_epoch == report.fits[1].best_epoch and report.fits[2].best_epoch > 0
    for site, old in zip(model.moe_sites(), before, strict=True):  # the neurons are the same, in another order
        assert torch.equal(site.up.weight.sort(0).values, old.up.sort(0).values)


def test_samples_hold_the_same_tokens_in_the_same_order():
    """Row by row, what each layer's FFN reads of the tokens that are no padding."""
    model, seen = tiny_model("opt", num_hidden_layers=LAYERS), {}
    for position, site in enumerate(find_sites(model)):
        site.first.register_forward_pre_hook(lambda _, args, i=position: seen.setdefault(i, []).append(args[0]))
    with profile(model, BATCHES, max_tokens=777, progress=False) as found:
        for position, stats in enumerate(found.sites):
            read = zip(seen[position], BATCHES, strict=False)  # not all batches are
            rows = [x.reshape(-1, WIDTH)[batch["attention_mask"].flatten() == 1] for x, batch in read]
            assert torch.equal(stats.inputs, torch.cat(rows)[:777])
        found.sites[1].inputs = found.sites[1].inputs[:-1]
        with pytest.raises(ValueError, match="776 tokens of decoder.layers.1 and 777 of decoder.layers.0"):
            matched_orders("pre_gated", find_sites(model), [torch.arange(48)] * LAYERS, [EXPERTS] * LAYERS, found, 0)


def test_one_router_finds_the_planted_experts_of_all_layers(lying, monkeypatch):
    model, permutations = planted()
    report = moefy_(model, as_they_lie(splitter="random"), BATCHES, progress=False)
    for fit in report.fits:
        assert fit.random == pytest.approx(1 / EXPERTS) and fit.best_epoch == report.fits[0].best_epoch > 0
        assert fit.captured > 0.9 * fit.oracle > fit.random
    # were experts left as they lie, one choice could serve one layer only
    monkeypatch.setattr(pipeline, "matched_orders", lambda router, sites, orders, *_: orders)
    other, _ = planted()
    unaligned = moefy_(other, as_they_lie(splitter="random"), BATCHES, progress=False)
    pairs = list(zip(report.fits, unaligned.fits, strict=True))
    assert sum(a.captured / a.oracle - b.captured / b.oracle for a, b in pairs) / len(pairs) > 0.15


@torch.no_grad()
def test_fitted_to_the_mean_of_the_layers_shares():
    """Against norms of outputs that are computed one by one."""
    model, _ = planted()
    convert(model, router="random", expert_size=SIZE)
    with profile(model, BATCHES, progress=False) as found:
        mean = _mean_shares(model.moe_sites(), found, [0, 1, 2]).clone()
        expected = torch.zeros_like(mean)
        for site, stats in zip(model.moe_sites(), found.sites, strict=True):
            neurons = torch.relu(stats.inputs @ site.up.weight.T + site.up.bias).view(-1, EXPERTS, SIZE)
            down = site.down.weight.view(WIDTH, EXPERTS, SIZE)
            norms = torch.stack([(neurons[:, e] @ down[:, e].T).norm(dim=-1) for e in range(EXPERTS)], 1)
            expected += norms / norms.sum(-1, keepdim=True).clamp_min(1e-12) / LAYERS
    torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-5)


def test_a_reroute_that_fails_moves_nothing(monkeypatch):
    model, _ = planted()
    convert(model, router="random", expert_size=SIZE)
    before = copy.deepcopy(model.state_dict())
    with profile(model, BATCHES, progress=False) as found:
        monkeypatch.setattr("moefy_hf.conversion.pipeline.fit_routers_", lambda *_, **__: pytest.fail("planted"))
        with pytest.raises(pytest.fail.Exception, match="planted"):
            reroute_(model, "pre_gated", found, progress=False)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- who asks routers outside a forward pass


def pre_gated(head: str = "AutoModelForSequenceClassification", k=2):
    """Three layers of BERT, neither fitted nor aligned, that choose differently by each other's inputs."""
    torch.manual_seed(0)
    model = tiny_model("bert", head, num_hidden_layers=LAYERS)
    pipeline.install_routers_(model, as_they_lie().section())
    model.set_selection(type="top_k", k=k, allocation="uniform")
    with torch.no_grad():
        model.moe_sites()[0].act.router.weight.normal_()
    return model


def kept_by_hand(model, found, k: int) -> torch.Tensor:
    """(T, E) of the first layer's input, for all layers."""
    scores = found.sites[0].inputs @ model.moe_sites()[0].act.router.weight.T
    return torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, scores.topk(k).indices, True)


@torch.no_grad()
def test_local_figures():
    model = pre_gated()
    point = SweepPoint(None, (("type", "top_k"), ("k", 2), ("allocation", "uniform")))
    (figures,) = local_figures(model, BATCHES[:3], [point], 10**6)
    with selecting(model, k=1.0), profile(model, BATCHES[:3], progress=False) as found:
        keep = kept_by_hand(model, found, 2)
        for site, stats, layer in zip(model.moe_sites(), found.sites, figures, strict=True):
            mass = site.weights().neurons(stats.inputs).clamp_min(0).view(-1, EXPERTS, SIZE).sum(-1)
            assert layer["captured_mass"] == pytest.approx(float((mass * keep).sum() / mass.sum()), rel=1e-4)


@torch.no_grad()
def test_means_of_what_does_not_run():
    model = pre_gated()
    with profile(model, BATCHES, progress=False) as found:
        dropped = ~kept_by_hand(model, found, 2).repeat_interleave(SIZE, -1)
        compensate_(model, found, progress=False)
        for site, stats in zip(model.moe_sites(), found.sites, strict=True):
            neurons = site.weights().neurons(stats.inputs)
            expected = (neurons * dropped).sum(0) / dropped.sum(0).clamp_min(1)
            torch.testing.assert_close(site.act.compensation, expected, rtol=1e-4, atol=1e-6)
        first = model.moe_sites()[0]
        assert torch.equal(means_of_dropped(first, found.sites[0].sample).float(), first.act.compensation)
    assert model(**BATCHES[0]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["threshold", "top_p", "level"])
def test_budgets_of_dynamic_selections(kind):
    model = pre_gated()
    calibrate_thresholds_(model, BATCHES, [kind], progress=False)
    tables = model.config.moefication["reach"][kind]
    assert tables[0] == tables[1] == tables[2]  # one router
    model.set_selection(type=kind, k=3)
    rows = evaluate(model, BATCHES[:4], [3], controls=["oracle", "random"], progress=False).rows
    assert rows[1]["experts"] == pytest.approx(0.5, rel=0.1) and len(rows) == 4


@torch.no_grad()
def test_sensitivity_is_that_of_one_layer_restricted():
    """Also where the layers before it are not run again."""
    model, batches = pre_gated(), text_batches(2)
    allocate_budgets_(model, batches, 0.5, progress=False)
    found = model.config.moefication["sensitivity"]
    for layer, (ks, losses) in enumerate(zip(found["k"], found["loss"], strict=True)):
        for k, loss in zip(ks, losses, strict=True):
            quality = Quality()
            for batch in batches:
                with selecting(model, type="top_k", k=1.0, allocation="uniform"):
                    dense = predictions(model, batch)[0]
                restricted = [k if position == layer else EXPERTS for position in range(LAYERS)]
                with selecting(model, type="top_k", k=restricted, allocation="uniform"):
                    quality.update_(predictions(model, batch)[0], dense, None)
            assert loss == pytest.approx(quality.divergence / quality.count, rel=1e-3, abs=1e-7)
        assert losses[0] > 1e-6


def test_flops_count_the_router_once():
    model = pre_gated()
    first, second, third = sites = model.moe_sites()
    dense, router = ffn_flops(first), 2 * WIDTH * EXPERTS
    assert routed_flops(first, 2) == pytest.approx(dense / 3 + router)
    assert routed_flops(second, 2) == pytest.approx(dense / 3)
    counted = model_flops(model, BATCHES[0])
    for budgets, cost in (
        ([2, 2, 2], dense + router),
        ([6, 3, 6], 2.5 * dense + router),  # the first layer computes all its experts, and scores for the second
        ([6, 6, 6], 3 * dense),
        ([3, 6, 6], 2.5 * dense + router),
    ):
        computed = {site.key: k for site, k in zip(sites, budgets, strict=True)}
        assert counted.routed(find_sites(model), computed) == pytest.approx(cost)
    assert third.act.router.flops() == 0


def test_pruning_keeps_one_choice_for_all():
    model, inputs = pre_gated("AutoModel", k=1.0), BATCHES[0]
    with pytest.raises(ValueError, match="layers 0 and 1 have one router"):
        prune(model, {0: [1, 4], 1: [0, 4], 2: [1, 4]})
    same = {layer: [1, 4] for layer in range(LAYERS)}
    pruned = prune(model, same).eval()
    with torch.no_grad(), model.disable_experts(same):
        torch.testing.assert_close(pruned(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_profiles_are_left_for_others():
    model, _ = planted()
    with profile(model, BATCHES, progress=False) as found:
        moefy_(model, as_they_lie(splitter="gate_clustering"), found, progress=False)
        assert len(fit_routers_(model, found, epochs=1, progress=False)) == LAYERS
