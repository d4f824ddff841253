"""Pruning really removes neurons, in every architecture, and leaves what the model does without them."""

import pytest
import torch
import transformers
from batches import text_batches
from tiny import NAMES, convert, distance, run, tiny_inputs, tiny_model
from transformers import AutoModelForSequenceClassification

from moefy_hf import MoEficationConfig, moefy_
from moefy_hf.analysis import prune
from moefy_hf.analysis.pruning import check_count, least_needed, least_used
from moefy_hf.modeling.ffn_sites import find_sites

GONE = {0: [1, 4], 1: [0, 5], 2: [2, 3], 3: [0, 1]}
REFUSED = {"clip": "different widths", "bart-uneven": "different widths"}


def gone(model) -> dict[int, list[int]]:
    return {layer: GONE[layer] for layer in range(len(model.moe_sites()))}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bart-uneven"])
def test_what_is_left_is_the_model_without_them(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    convert(model, towers=None)
    before = run(model, inputs)
    with model.disable_experts(gone(model)):
        expected = run(model, inputs)
    pruned = prune(model, gone(model)).eval()
    assert type(pruned) is type(model) and {site.sizes[1] for site in pruned.moe_sites()} == {32}
    assert pruned.num_parameters() < model.num_parameters()
    assert distance(expected, run(pruned, inputs)) < 1e-5 < distance(before, expected)
    assert distance(before, run(model, inputs)) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_config_cannot_say_is_refused(name):
    model = tiny_model(name)
    convert(model, towers="all")
    with pytest.raises(ValueError, match=REFUSED[name]):
        prune(model, gone(model))


@pytest.mark.parametrize("router", ["similarity", "random"])
def test_routers_choose_among_what_is_left(router):
    """With a budget that leaves a choice: where no token wanted a pruned expert, nothing changes."""
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    convert(model, k=2, router=router)
    handles = []
    for layer, site in enumerate(model.moe_sites()):  # nobody wants what is going to be pruned
        unwanted = torch.tensor(gone(model)[layer])
        hook = site.act.router.register_forward_hook(lambda _, args, y, at=unwanted: y.index_fill(-1, at, -1e9))
        handles.append(hook)
    expected = run(model, inputs)
    for handle in handles:
        handle.remove()
    pruned = prune(model, gone(model)).eval()
    assert pruned.config.moefication["selection"]["k"] == 2
    assert distance(expected, run(pruned, inputs)) < 1e-5


def test_budgets_stay_counts(tmp_path):
    model = tiny_model("bert")
    convert(model, k=[5, 2])
    assert prune(model, gone(model)).config.moefication["selection"]["k"] == [4, 2]
    model.set_selection(k=0.5)
    assert prune(model, gone(model)).config.moefication["selection"]["k"] == 3


def test_shared_experts_stay():
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    everything = {"type": "top_k", "k": 1.0}
    config = MoEficationConfig(
        expert_size=8, splitter="random", router="random", shared_experts=1, selection=everything
    )
    moefy_(model, config, text_batches(2))
    for site in model.moe_sites():
        site.act.compensate_(torch.arange(48.0))
    model.config.moefication["compensation"] = True
    experts = {0: [1, 4], 1: [2, 5]}
    with model.disable_experts(experts):
        expected = run(model, inputs)
    pruned = prune(model, experts).eval()
    assert distance(expected, run(pruned, inputs)) < 1e-5
    act = pruned.moe_sites()[0].act
    assert act.shared == 1 and act.router.num_experts == 3
    assert torch.equal(act.router.weight, model.moe_sites()[0].act.router.weight[[1, 2, 4]])  # experts 2, 3 and 5
    assert act.compensation[8:24].tolist() == [*range(16, 32)]  # experts 2 and 3 of before
    with pytest.raises(ValueError, match="no expert 0 to prune: choose from 1 to 5"):
        prune(model, {0: [0, 1], 1: [2, 5]})


def test_it_loads_everywhere(tmp_path):
    model, inputs = tiny_model("bert", "AutoModelForSequenceClassification"), tiny_inputs("bert")
    convert(model, k=2, num_experts=6)
    pruned = prune(model, gone(model)).eval()
    pruned.save_pretrained(tmp_path)
    assert pruned.config.moefication["num_experts"] == 4
    moe = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert distance(run(pruned, inputs), run(moe, inputs)) < 1e-6
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(dense) is transformers.BertForSequenceClassification
    assert {site.sizes[1] for site in find_sites(dense)} == {32}
    pruned.set_selection(k=1.0)
    assert distance(run(pruned, inputs), run(dense, inputs)) < 1e-6


@pytest.mark.parametrize(
    "experts, message",
    [
        ({0: [1], 1: []}, "layers would lose 1, 0 experts: an ordinary config has one width"),
        ({0: [1]}, "layers would lose 1, 0 experts"),
        ({5: [1]}, "no routed layer 5: choose from 0 to 1"),
        ({0: [6], 1: [1]}, "layer 0 has no expert 6 to prune: choose from 0 to 5"),
        ({0: range(6), 1: range(6)}, "6 of 6 experts cannot go"),
    ],
)
def test_bad_experts(experts, message):
    model = tiny_model("bert")
    convert(model)
    with pytest.raises(ValueError, match=message):
        prune(model, experts)


def test_what_cannot_be_pruned():
    with pytest.raises(ValueError, match="BertModel is not MoEfied"):
        prune(tiny_model("bert"), {})
    model = tiny_model("bert")
    convert(model, layers=[1])
    with pytest.raises(ValueError, match="not routed keep their width"):
        prune(model, {0: [1]})
    model = tiny_model("bert")
    batches = text_batches(2)
    config = MoEficationConfig(expert_size=8, splitter="random", router="mlp", selection={"type": "top_k", "k": 2})
    moefy_(model, config, batches)
    with pytest.raises(ValueError, match="MLPRouter mixes experts"):
        prune(model, gone(model))


def test_least_used():
    assert least_used([[3.0, 1, 2, 0], [5, 5, 0, 9]], 2) == {0: [1, 3], 1: [0, 2]}
    assert least_used([[0.0, 1, 2, 3]], 1, spared=1) == {0: [1]}


def test_least_needed():
    model = tiny_model("bert")
    convert(model, num_experts=3)
    ranking = [(1, 0), (0, 2), (0, 0), (1, 2), (1, 1), (0, 1)]
    assert least_needed(model, ranking, 1) == {0: [1], 1: [1]}
    assert least_needed(model, ranking, 2) == {0: [0, 1], 1: [1, 2]}
    with pytest.raises(ValueError, match="other experts than those 6"):
        least_needed(model, ranking[1:], 1)
    check_count(model, 2)
    for count in (0, 3):
        with pytest.raises(ValueError, match="choose 1 to 2 experts"):
            check_count(model, count)
