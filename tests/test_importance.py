"""Budgets by angular distance (CFSP): what is measured against hidden states, what is spent, where it can be used."""

import copy
import math

import pytest
import torch
from batches import text_batches
from tiny import NAMES, convert, distance, run, tiny_inputs, tiny_model

from moefy_hf import MoEficationConfig, allocate_budgets_, calibrate_thresholds_, evaluate, moefy_, reroute_
from moefy_hf.conversion.budgets import COMPARING_PREDICTIONS, MEASURES, angular_distance, measure_angles
from moefy_hf.conversion.replay import block_of
from moefy_hf.loading import moefied_class
from moefy_hf.modeling.budget_allocation import MEASURED
from moefy_hf.modeling.selection import SELECTIONS

LAYERS, EXPERTS = 4, 12
DYNAMIC = [name for name, cls in SELECTIONS.items() if cls.dynamic]
ANGULAR = {"type": "top_k", "k": 0.5, "allocation": "angular"}


def dense(head: str = "AutoModel"):
    """A Llama of four layers, of which later ones add ever less to the hidden states."""
    model = tiny_model("llama", head, num_hidden_layers=LAYERS)
    with torch.no_grad():
        for layer, block in enumerate(model.base_model.layers):
            for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight):
                weight.mul_(3 * 0.5**layer)
    return model


def routed(head: str = "AutoModel", k=0.5, **settings):
    """The same with 12 experts a layer and random routers."""
    model = dense(head)
    convert(model, k=k, expert_size=4, **settings)
    return model


def counts(model) -> list[int]:
    return [site.act.selection.k + site.act.shared for site in model.moe_sites()]


def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1, 1).acos() / math.pi


@torch.no_grad()
def angles_by_hand(batches, head: str = "AutoModel") -> list[float]:
    """Of the dense model, from the hidden states that transformers returns; what the last layer does is returned
    normalised, and taken from a hook."""
    model, found, last = dense(head), [], []
    model.base_model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    for batch in batches:
        states = [*model(**batch, output_hidden_states=True).hidden_states[:-1], last.pop()]
        real = batch["attention_mask"].bool()
        found.append(torch.stack([angle(x, y)[real] for x, y in zip(states, states[1:], strict=False)]))
    return torch.cat(found, dim=1).mean(1).tolist()


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForCausalLM"])
def test_importance_is_the_mean_angle_between_hidden_states(head):
    model, batches = routed(head), text_batches(3)
    found = measure_angles(model, (batch for batch in batches), progress=False)["distance"]
    assert found == pytest.approx(angles_by_hand(batches, head), abs=1e-6)
    assert found == sorted(found, reverse=True) and found[0] > 2 * found[-1] > 0
    assert counts(model) == [6] * LAYERS  # the selection it had


def test_only_converted_layers_are_measured():
    found = measure_angles(routed(layers=[1, 3]), text_batches(2), progress=False)["distance"]
    assert found == pytest.approx(angles_by_hand(text_batches(2))[1::2], abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_gives_its_layers_hidden_states(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    inputs = {key: value for key, value in inputs.items() if not key.endswith("attention_mask")}
    convert(model)
    given, returned = {}, {}

    def before(layer, args, kwargs):
        given[layer] = (args[0] if args else kwargs["hidden_states"]).clone()

    def after(layer, args, output):
        returned[layer] = output[0] if isinstance(output, tuple) else output

    layers = [block_of(model, site) for site in model.moe_sites()]
    for layer in layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after)
    model(**inputs)
    expected = [float(angle(given[layer], returned[layer]).mean()) for layer in layers]
    found = measure_angles(model, [inputs], progress=False)["distance"]
    assert found == pytest.approx(expected, abs=1e-5) and all(0.01 < each < 1 for each in found)


@pytest.mark.parametrize("degrees", [0, 0.01, 1, 45, 90, 179.99, 180])
def test_angles(degrees):
    x = torch.tensor([[2.0, 0.0]])
    y = 5 * torch.tensor([[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]])
    assert float(angular_distance(x, y)) == pytest.approx(degrees / 180, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("share", [1, 2, 5, 12, 0.09, 0.2, 0.5, 0.77, 1.0])
def test_the_budget_is_spent_and_layers_that_turn_more_get_more(share):
    model = routed()
    found = allocate_budgets_(model, text_batches(2), share, "angular", progress=False)
    each = share if isinstance(share, int) else max(1, round(share * EXPERTS))
    assert sum(found) == LAYERS * each and all(1 <= k <= EXPERTS for k in found)
    assert found == counts(model) == sorted(found, reverse=True)  # as the angles are
    assert each in (1, 12) or found[0] > found[-1]
    assert model.config.moefication["selection"] == {**ANGULAR, "k": share}


def test_survives_saving(tmp_path):
    model, inputs = routed(), tiny_inputs("llama")
    allocate_budgets_(model, text_batches(2), 0.25, "angular", progress=False)
    model.save_pretrained(tmp_path)
    loaded = moefied_class(type(model).stock_class()).from_pretrained(tmp_path).eval()
    assert counts(loaded) == counts(model)
    assert loaded.config.moefication["angular"] == model.config.moefication["angular"]
    assert distance(run(loaded, inputs), run(model, inputs)) < 1e-6
    for each in (model, loaded):
        each.set_selection(k=0.6)
    assert counts(loaded) == counts(model) and sum(counts(loaded)) == 7 * LAYERS


@pytest.mark.parametrize("shared", [0, 3])
def test_a_model_without_head_is_converted_by_it(shared):
    model = dense()
    config = MoEficationConfig(
        expert_size=4, splitter="random", router="random", selection={**ANGULAR, "k": 0.3}, shared_experts=shared
    )
    report = moefy_(model, config, text_batches(8), progress=False)
    section = model.config.moefication
    assert section["angular"]["distance"] == pytest.approx(angles_by_hand(text_batches(8)), abs=1e-6)
    assert section["selection"] == {**ANGULAR, "k": 0.3} and "sensitivity" not in section
    assert report.k == [site.act.k for site in model.moe_sites()] and "budgets" in report.seconds
    assert sum(counts(model)) == 4 * LAYERS and min(counts(model)) >= max(1, shared)
    assert len(set(counts(model))) > 1


@pytest.mark.parametrize("kind", DYNAMIC)
def test_dynamic_selections_spend_it_on_average(kind):
    model = dense()
    config = MoEficationConfig(expert_size=4, splitter="random", router="linear", selection={**ANGULAR, "type": kind})
    moefy_(model, config, text_batches(8), progress=False)
    dynamic = [site.act.k for site in model.moe_sites()]
    assert {type(site.act.selection) for site in model.moe_sites()} == {SELECTIONS[kind]}
    model.set_selection(type="top_k")
    assert dynamic == pytest.approx(counts(model)) and len(set(counts(model))) > 1
    assert sum(counts(model)) == 6 * LAYERS
    other = routed()
    allocate_budgets_(other, text_batches(2), 0.5, "angular", progress=False)
    calibrate_thresholds_(other, text_batches(8), [kind], progress=False)
    expected = counts(other)
    other.set_selection(type=kind)
    assert [site.act.k for site in other.moe_sites()] == pytest.approx(expected)


def test_it_stands_beside_others_in_a_sweep():
    model, batches = routed("AutoModelForCausalLM"), text_batches(2, labels="causal")
    allocate_budgets_(model, batches, 0.5, progress=False)
    allocate_budgets_(model, batches, 0.5, "angular", progress=False)
    assert {"sensitivity", "angular"} < set(model.config.moefication)
    names = ["uniform", "sensitivity", "angular"]
    rows = evaluate(model, batches, [0.5], controls=[], allocations=names, local_tokens=0, progress=False).rows[1:]
    assert [row["allocation"] for row in rows] == names and {row["experts"] for row in rows} == {0.5}
    assert rows[2]["k_per_layer"] == counts(model) != rows[0]["k_per_layer"]


def test_other_routers_leave_it_as_it_is():
    model = routed()
    allocate_budgets_(model, text_batches(2), 0.5, "angular", progress=False)
    measured, before = copy.deepcopy(model.config.moefication["angular"]), counts(model)
    reroute_(model, "similarity")
    assert model.config.moefication["angular"] == measured and counts(model) == before


def test_what_can_be_measured_can_be_spread():
    assert set(MEASURES) == set(MEASURED) and set(COMPARING_PREDICTIONS) < set(MEASURES)


class Unreadable(list):
    def __iter__(self):
        raise AssertionError("the data were read")


def test_what_is_refused():
    model = routed()
    before = copy.deepcopy(model.config.moefication), counts(model)
    for name in ("uniform", "global", "cosine"):
        with pytest.raises(ValueError, match=f"{name!r} measures nothing; choose from sensitivity, angular"):
            allocate_budgets_(model, Unreadable(), 0.5, name, progress=False)
    with pytest.raises(ValueError, match="k=13"):
        allocate_budgets_(model, Unreadable(), 13, "angular", progress=False)
    with pytest.raises(ValueError, match="no batch"):
        allocate_budgets_(model, [], 0.5, "angular", progress=False)
    with pytest.raises(ValueError, match='allocate_budgets_.model, data, allocation="angular"'):
        model.set_selection(allocation="angular")
    assert (model.config.moefication, counts(model)) == before
    config = MoEficationConfig(expert_size=4, splitter="random", router="random", selection=ANGULAR)
    with pytest.raises(ValueError, match='data is missing: allocation "angular" learns'):
        moefy_(tiny_model("llama"), config)


@pytest.mark.parametrize("training", [True, False])
def test_everything_returns_even_after_an_error(training):
    model = routed(k=[1, 2, 3, 4]).train(training)

    def state():
        hooks = [len(module._forward_hooks) for module in model.modules()]
        return copy.deepcopy(model.config.moefication), counts(model), hooks, [m.training for m in model.modules()]

    before = state()
    measure_angles(model, text_batches(1), progress=False)
    assert state() == before
    with pytest.raises(ValueError, match="embeddings of 99 tokens"):
        measure_angles(model, [*text_batches(1), {"input_ids": torch.tensor([[1000]])}], progress=False)
    assert state() == before
