"""Budgets per layer: what is measured against direct runs, what is spent, what survives saving."""

import copy

import pytest
import torch
from batches import text_batches
from tiny import distance, run, tiny_inputs, tiny_model

from moefy_hf import MoEficationConfig, allocate_budgets_, moefy_
from moefy_hf.conversion.budgets import GRID, measure_sensitivity
from moefy_hf.loading import moefied_class

HEAD, LAYERS, EXPERTS = "AutoModelForSequenceClassification", 3, 12


def routed(name: str = "bert", head: str = HEAD, k=0.5, **changes):
    """Three layers of 12 experts with random routers."""
    model = tiny_model(name, head, num_hidden_layers=LAYERS, **changes)
    selection = {"type": "top_k", "k": k, "allocation": "uniform"}
    moefy_(model, MoEficationConfig(expert_size=4, splitter="random", router="random", selection=selection))
    return model


def counts(model) -> list[int]:
    return [site.act.selection.k for site in model.moe_sites()]


@torch.no_grad()
def kl_by_hand(model, batches, ks: list[int]) -> float:
    """Mean KL(all experts || these) of the predictions."""
    model, total, rows = copy.deepcopy(model), 0.0, 0
    for batch in batches:
        model.set_selection(k=[EXPERTS] * LAYERS)
        p = model(**batch).logits.double().softmax(-1)
        model.set_selection(k=ks)
        q = model(**batch).logits.double().softmax(-1)
        total += float((p * (p.log() - q.log())).sum())
        rows += len(p)
    return total / rows


def test_sensitivity_is_the_divergence_of_one_layer_restricted():
    model, batches = routed(), text_batches(2)
    found = measure_sensitivity(model, batches, progress=False)
    assert counts(model) == [6] * LAYERS
    for layer, (ks, losses) in enumerate(zip(found["k"], found["loss"], strict=True)):
        assert ks == sorted({max(1, round(share * EXPERTS)) for share in GRID} | {EXPERTS})
        assert len(losses) == len(ks) and losses[-1] == 0
        for k, loss in zip(ks, losses, strict=True):
            restricted = [k if position == layer else EXPERTS for position in range(LAYERS)]
            assert loss == pytest.approx(kl_by_hand(model, batches, restricted), rel=1e-3, abs=1e-7)
        assert losses[0] > 1e-5


def test_a_layer_that_does_not_matter_gets_the_minimum():
    model = routed()
    with torch.no_grad():
        model.moe_sites()[1].down.weight.zero_()
    assert allocate_budgets_(model, text_batches(2), 0.5, progress=False)[1] == 1
    assert model.config.moefication["sensitivity"]["loss"][1] == pytest.approx([0.0] * 5, abs=1e-12)
    assert sum(counts(model)) == 18


def test_a_layer_that_matters_more_gets_more():
    model = routed()
    with torch.no_grad():
        model.moe_sites()[0].down.weight.mul_(0.05)
        model.moe_sites()[2].down.weight.mul_(5)
    first, second, third = allocate_budgets_(model, text_batches(2), 0.5, progress=False)
    assert first < second < third and first + second + third == 18


@pytest.mark.parametrize("share", [1, 2, 5, 12, 0.09, 0.2, 0.5, 0.77, 1.0])
def test_the_budget_is_spent_exactly(share):
    model = routed()
    found = allocate_budgets_(model, text_batches(1), share, progress=False)
    each = share if isinstance(share, int) else max(1, round(share * EXPERTS))
    assert sum(found) == LAYERS * each and all(1 <= k <= EXPERTS for k in found)
    assert found == counts(model)
    assert model.config.moefication["selection"] == {"type": "top_k", "k": share, "allocation": "sensitivity"}


def test_other_budgets_afterwards_need_no_data():
    model = routed()
    allocate_budgets_(model, text_batches(2), 0.2, progress=False)
    measured = copy.deepcopy(model.config.moefication["sensitivity"])
    for share in (0.5, 3):
        model.set_selection(k=share)
        direct = routed()
        assert allocate_budgets_(direct, text_batches(2), share, progress=False) == counts(model)
    assert model.config.moefication["sensitivity"] == measured
    model.set_selection(k=0.5, allocation="uniform")
    assert counts(model) == [6] * LAYERS
    model.set_selection(allocation="sensitivity")
    assert counts(model) != [6] * LAYERS and sum(counts(model)) == 18


def test_survives_saving(tmp_path):
    model, inputs = routed(), tiny_inputs("bert")
    allocate_budgets_(model, text_batches(2), 0.2, progress=False)
    model.save_pretrained(tmp_path)
    loaded = moefied_class(type(model).stock_class()).from_pretrained(tmp_path).eval()
    assert counts(loaded) == counts(model)
    assert loaded.config.moefication["sensitivity"] == model.config.moefication["sensitivity"]
    assert distance(run(loaded, inputs), run(model, inputs)) < 1e-6
    for each in (model, loaded):
        each.set_selection(k=0.6)
    assert counts(loaded) == counts(model) and sum(counts(loaded)) == 21


def test_causal_models_without_labels():
    model = routed("llama", "AutoModelForCausalLM")
    assert sum(allocate_budgets_(model, text_batches(1), 0.5, progress=False)) == 18


def test_data_is_read_once():
    model, again = routed(), routed()
    data = (batch for batch in text_batches(2))
    expected = allocate_budgets_(again, text_batches(2), 0.5, progress=False)
    assert allocate_budgets_(model, data, 0.5, progress=False) == expected


def state_of(model):
    return copy.deepcopy(model.config.moefication), counts(model), [module.training for module in model.modules()]


class Unreadable(list):
    def __iter__(self):
        raise AssertionError("the data were read")


@pytest.mark.parametrize("share", [0, 13, 0.0, 1.01, "0.2", None, [1, 2, 3]])
def test_a_bad_share_is_found_before_the_work(share):
    model = routed()
    before = state_of(model)
    with pytest.raises(ValueError, match="k"):
        allocate_budgets_(model, Unreadable(), share, progress=False)
    assert state_of(model) == before


def test_what_is_refused():
    with pytest.raises(ValueError, match="not MoEfied"):
        allocate_budgets_(tiny_model("bert", HEAD), text_batches(1), progress=False)
    model = routed()
    before = state_of(model)
    with pytest.raises(ValueError, match="no batch"):
        allocate_budgets_(model, [], progress=False)
    assert state_of(model) == before
    headless = routed(head="AutoModel")
    with pytest.raises(ValueError, match="no logits"):
        allocate_budgets_(headless, text_batches(1), progress=False)
    assert counts(headless) == [6] * LAYERS
    with pytest.raises(ValueError, match="allocate_budgets_"):
        headless.set_selection(allocation="sensitivity")
    assert counts(headless) == [6] * LAYERS


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_selection_return_even_after_an_error(training):
    model = routed(k=[1, 2, 3]).train(training)
    before = state_of(model)
    measure_sensitivity(model, text_batches(1), progress=False)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="embeddings of 99 tokens"):
        allocate_budgets_(model, [*text_batches(1), {"input_ids": torch.tensor([[1000]])}], progress=False)
    assert state_of(model) == before


def test_one_expert_is_nothing_to_measure():
    model = tiny_model("bert", HEAD)
    moefy_(
        model,
        MoEficationConfig(num_experts=1, splitter="random", router="random", selection={"type": "top_k", "k": 1}),
    )
    assert allocate_budgets_(model, text_batches(1), 1, progress=False) == [1, 1]
