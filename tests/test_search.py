"""Budgets for a target: what is found is within the FLOPs, or keeps the quality, and one expert less does not."""

import pytest
import torch
from batches import text_batches
from tiny import convert, tiny_model

from moefy_hf import allocate_budgets_, calibrate_thresholds_, evaluate, find_budget
from moefy_hf.evaluation.search import search, share_within
from moefy_hf.modeling.selection import SELECTIONS

DYNAMIC = [name for name, cls in SELECTIONS.items() if cls.dynamic]


def language_model(**settings):
    torch.manual_seed(0)
    model = tiny_model("llama", "AutoModelForCausalLM")
    for site in convertible(model):
        site.mul_(6)  # so that FFNs matter
    convert(model, expert_size=2, splitter="random", router="similarity", **settings)
    return model


def convertible(model):
    return [weight.data for name, weight in model.named_parameters() if "mlp" in name]


def batches(count=4):
    found = text_batches(count, rows=4, length=12, seed=2)
    return [{**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in found]


def spent(model, k) -> float:
    (row,) = evaluate(model, batches(1), [k], controls=[], local_tokens=0, progress=False).rows[1:]
    return row["ffn_flops"]


@pytest.mark.parametrize("flops", [0.25, 0.35, 0.5, 0.87, 1.0])
@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_the_most_experts_within_flops(flops, allocation):
    model = language_model(k=0.5)
    if allocation == "sensitivity":
        allocate_budgets_(model, batches(), 0.5, progress=False)
    before = dict(model.config.moefication["selection"])
    share = share_within(model, flops)
    assert model.config.moefication["selection"] == before
    assert spent(model, share) <= flops + 1e-9
    assert share == 1.0 or spent(model, share + 1 / 24) > flops
    model.set_selection(k=share)


def test_flops_of_a_selection_that_depends_on_the_token():
    model = language_model(k=0.5)
    calibrate_thresholds_(model, batches(), ["level"], progress=False)
    model.set_selection(type="level", k=0.5, allocation="global")
    with torch.no_grad():
        share = share_within(model, 0.6)
    model.set_selection(k=share)
    assert 0.55 < sum(site.act.k for site in model.moe_sites()) / 48 + 1 / 6 <= 0.6  # 24 x 16 of a router


@pytest.mark.parametrize(
    ("flops", "message"),
    [(0, "in \\(0, 1\\]"), (1.2, "flops=1.2 is no share"), (0.1, "less than the least.*: 0.208 of dense")],
)
def test_flops_that_cannot_be(flops, message):
    with pytest.raises(ValueError, match=message):
        share_within(language_model(k=0.5), flops)


@pytest.mark.parametrize(("kind", "allocation"), [("top_k", "uniform"), ("level", "uniform"), ("level", "global")])
def test_the_fewest_experts_that_keep_a_quality(kind, allocation):
    model, data = language_model(k=0.5), batches()
    calibrate_thresholds_(model, data, DYNAMIC, progress=False)
    before = dict(model.config.moefication["selection"])
    whole = evaluate(model, data, [k / 24 for k in range(1, 25)], controls=[], selections=[kind], local_tokens=0,
                     allocations=[allocation], progress=False)  # fmt: skip
    by_count = [row["relative_quality"] for row in whole.rows[1:]]
    target = (1 + max(by_count)) / 2
    selection, found = search(model, data, target, selection={"type": kind, "allocation": allocation}, progress=False)
    assert model.config.moefication["selection"] == before and len(found.rows) <= 7
    model.set_selection(**selection)
    reached = evaluate(model, data, [1.0], controls=[], local_tokens=0, progress=False).rows[0]
    with torch.no_grad():
        losses = [model(**batch).loss * (batch["labels"][:, 1:] != -100).sum() for batch in data]
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data)
    relative = float((sum(losses) / count).exp()) / reached["perplexity"]
    assert 1 < relative <= target
    if allocation == "global":
        assert set(selection) == {"type", "level"}
    else:
        count = round(selection["k"] * 24)
        assert by_count[count - 2] > target >= by_count[count - 1] == pytest.approx(relative, rel=1e-4)
    assert [row["experts"] for row in found.rows] == sorted(
        [row["experts"] for row in found.rows], key=lambda share: (share != 1.0, share)
    )
    assert found.facts["target"] == {"quality": target, "selection": selection}


def test_accuracy_and_agreement_are_kept_from_below():
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    convert(model, expert_size=2, splitter="random", router="similarity", k=0.5)
    data = text_batches(4, rows=8, seed=5)
    selection, found = search(model, data, 0.9, progress=False)
    assert found.facts["quality"] == "agreement" and found.rows[0]["router"] == "dense"
    good = [row for row in found.rows[1:] if row["k"] >= selection["k"]]
    bad = [row for row in found.rows[1:] if row["k"] < selection["k"]]
    assert all(row["relative_quality"] >= 0.9 for row in good) and all(row["relative_quality"] < 0.9 for row in bad)


@pytest.mark.parametrize(
    ("labels", "quality", "message"),
    [(True, 0.9, "perplexity of 0.9 of dense.*1 or more"), (False, 1.1, "1.1 of the dense.*in \\(0, 1\\]")],
)
def test_qualities_that_cannot_be(labels, quality, message):
    data = batches() if labels else text_batches(2)
    with pytest.raises(ValueError, match=message):
        search(language_model(k=0.5), data, quality, progress=False)


def test_one_verb_for_both_goals():
    model, data = language_model(k=0.5), batches()
    assert find_budget(model, flops=0.5) == {"k": share_within(model, 0.5)}
    assert find_budget(model, data, quality=1.2, progress=False) == search(model, data, 1.2, progress=False)[0]
    for wrong in ({}, {"quality": 1.2, "flops": 0.5}):
        with pytest.raises(ValueError, match="one goal"):
            find_budget(model, data, **wrong)
    with pytest.raises(ValueError, match="batches"):
        find_budget(model, quality=1.2)


def test_a_type_that_was_not_measured():
    with pytest.raises(ValueError, match="calibrate_thresholds_"):
        search(language_model(k=0.5), batches(), 1.1, selection={"type": "threshold"}, progress=False)
