"""FFNs are found where the model really computes them, and reordering their neurons changes nothing but the order."""

import copy

import pytest
import torch
from tiny import NAMES, convert, distance, run, tiny, tiny_inputs, tiny_model
from torch import nn
from transformers import MambaConfig, MambaModel, MixtralConfig, MixtralModel
from transformers.optimization import Adafactor

from moefy_hf.conversion.permute import permute_neurons_
from moefy_hf.errors import MoefyError, UnsupportedModel
from moefy_hf.modeling import ffn_sites

SIZES = {  # (d, f) of each FFN, where not (16, 48)
    "clip": [(24, 48), (24, 48), (16, 32), (16, 32)],
    "bart-uneven": [(16, 32), (16, 32), (16, 64), (16, 64)],
}
LAYOUTS = ["t5", "t5-gated", "gpt2", "phi3", "llama", "bert", "bart-uneven"]  # ungated, gated, Conv1D, fused, ...


def random_orders(model: nn.Module, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(site.sizes[1], generator=generator) for site in find_sites(model)]


def find_sites(model: nn.Module) -> list[ffn_sites.FfnSite]:
    """All FFNs, of all towers."""
    return ffn_sites.find_sites(model, "all")


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_the_ffns_that_run(name):
    model = tiny_model(name)
    sites = find_sites(model)
    assert [site.sizes for site in sites] == SIZES.get(name, [(16, 48)] * tiny(name).ffns)
    assert len({site.name for site in sites}) == len(sites)
    seen = {}  # (site, end) -> what flows into its first and into its last matrix
    for site in sites:
        assert model.get_submodule(site.name) is site.owner
        for end, module in (("x", site.first), ("a", site.down)):
            key = (site.name, end)
            module.register_forward_pre_hook(lambda module, args, key=key: seen.__setitem__(key, args[0]))
    run(model, tiny_inputs(name))
    for site in sites:
        weights = site.weights()
        d, f = site.sizes
        assert weights.up.shape == (f, d) and weights.down.shape == (d, f) and weights.keys.shape == (f, d)
        torch.testing.assert_close(
            weights.neurons(seen[site.name, "x"]), seen[site.name, "a"], rtol=1e-5, atol=1e-6, msg=site.name
        )


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_views_of_the_parameters(name):
    for site in find_sites(tiny_model(name)):
        storages = {parameter.untyped_storage().data_ptr() for parameter in site.owner.parameters()}
        weights = site.weights()
        for tensor in (weights.up, weights.gate, weights.down, weights.up_bias, weights.gate_bias):
            assert tensor is None or tensor.untyped_storage().data_ptr() in storages


def test_sites_come_in_forward_order():
    model = tiny_model("bart")
    order = []
    for site in find_sites(model):
        site.down.register_forward_hook(lambda *_, name=site.name: order.append(name))
    run(model, tiny_inputs("bart"))
    assert order == [site.name for site in find_sites(model)]


def test_a_model_without_ffns_is_refused():
    config = MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedModel, match=r"no FFN of this MambaModel \(mamba\) can be split into experts$"):
        find_sites(MambaModel(config))


def test_a_mixture_of_experts_is_said_to_be_one():
    config = MixtralConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_local_experts=4,
    )
    with pytest.raises(UnsupportedModel, match=r"layers.0.mlp.*: it is part of a native Mixture of Experts"):
        find_sites(MixtralModel(config))


def test_names_do_not_matter():
    model = tiny_model("bert")
    for layer in model.encoder.layer:
        layer.intermediate.renamed = layer.intermediate.intermediate_act_fn
        del layer.intermediate.intermediate_act_fn
    assert [site.spec.act for site in find_sites(model)] == ["intermediate.renamed"] * 2


def test_what_is_not_found_again_is_an_error():
    """The FFNs of a MoEfied model are those that its config names."""
    model = tiny_model("bert")
    convert(model)
    layers = [*model.encoder.layer]
    assert [site.owner for site in find_sites(model)] == layers
    for entry in model.config.moefication["ffns"]:
        entry["up"] = "intermediate.renamed"
    with pytest.raises(MoefyError, match=r"BertModel has none of the FFNs that its config names: encoder.layer.\*"):
        find_sites(model)


@pytest.mark.parametrize("name", NAMES)
def test_permutation_changes_nothing_but_the_order(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    dense, before = run(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    for site, order in zip(find_sites(model), random_orders(model), strict=True):
        old = site.weights().up.detach().clone()
        permute_neurons_(site, order)
        assert torch.equal(site.weights().up, old[order])  # `order` lists the old index of each new neuron
    assert distance(run(model, inputs), dense) < 1e-5
    after = model.state_dict()
    assert after.keys() == before.keys() and any(not torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_a_forgotten_tensor_would_be_noticed(name):
    """The tolerance above means something: reorder one matrix or one bias alone, and the output moves far more."""
    inputs = tiny_inputs(name)
    dense = run(tiny_model(name), inputs)
    site = find_sites(tiny_model(name))[0]
    for tensor, _, dim, blocks in list(site.neuron_dims()):
        model = tiny_model(name)
        broken, order = find_sites(model)[0], random_orders(model)[0]
        parameter = broken.owner.get_parameter(tensor)
        whole = torch.cat([order + block * len(order) for block in range(blocks)])
        with torch.no_grad():
            parameter.copy_(parameter.index_select(dim, whole))
        assert distance(run(model, inputs), dense) > 1e-3, tensor


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_the_ffn_is_permuted(name):
    """All parameters with an entry per neuron are listed: an independent count over the matrices of the FFN."""
    site = find_sites(tiny_model(name))[0]
    listed = {id(parameter) for _, parameter, _, _ in site.neuron_dims()}
    for module in {id(m): m for m in (site.up, site.gate, site.down) if m is not None}.values():
        for key, parameter in module.named_parameters():
            assert (id(parameter) in listed) == (module is not site.down or key == "weight")


def train(model: nn.Module, inputs: dict, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs)[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    # a large eps: Adam divides rounding noise by itself where a gradient is zero
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9),
}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_optimizer_follows(name, optimizer_name):
    """Train, permute, train on: the same losses as without, and in the end the same parameters but for the order."""
    make, inputs = OPTIMIZERS[optimizer_name], tiny_inputs(name)
    straight, permuted, forgotten = (tiny_model(name).double() for _ in range(3))
    runs = {}
    for model, follow in ((straight, None), (permuted, True), (forgotten, False)):
        optimizer = make(model.parameters())
        losses = train(model, inputs, optimizer, 3)
        if follow is not None:
            for site, order in zip(find_sites(model), random_orders(model), strict=True):
                permute_neurons_(site, order, optimizer if follow else None)
        runs[follow] = losses + train(model, inputs, optimizer, 3)
    assert runs[True] == pytest.approx(runs[None], rel=1e-6)
    assert runs[False] != pytest.approx(runs[None], rel=1e-5)  # what forgetting the moments would do
    for site, order in zip(find_sites(straight), random_orders(straight), strict=True):
        permute_neurons_(site, order)
    for (key, a), b in zip(straight.named_parameters(), permuted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("optimizer_class", [Adafactor, torch.optim.Adafactor])
@pytest.mark.parametrize("name", ["t5", "gpt2", "phi3"])
def test_a_factored_optimizer_is_refused_and_nothing_changed(name, optimizer_class):
    model, inputs = tiny_model(name), tiny_inputs(name)
    optimizer = optimizer_class(model.parameters())
    train(model, inputs, optimizer, 2)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    for site, order in zip(find_sites(model), random_orders(model), strict=True):
        with pytest.raises(ValueError, match=r"Adafactor keeps '\w+', a Tensor of \(.*use AdamW or SGD"):
            permute_neurons_(site, order, optimizer)
    for key, value in before[0].items():
        assert torch.equal(model.state_dict()[key], value), key
    for state, old in zip(optimizer.state_dict()["state"].values(), before[1]["state"].values(), strict=True):
        assert all(torch.equal(value, old[key]) for key, value in state.items() if torch.is_tensor(value))


@pytest.mark.parametrize(
    "order",
    [
        torch.arange(47),
        torch.arange(49),
        torch.zeros(48, dtype=torch.int64),
        torch.arange(48) - 1,
        torch.arange(48) % 47,
        torch.arange(48.0),
        torch.arange(48, dtype=torch.int32),
        torch.arange(48).unsqueeze(0),
    ],
    ids=["short", "long", "zeros", "negative", "repeated", "float", "int32", "matrix"],
)
@pytest.mark.parametrize("name", ["bert", "phi3"])
def test_what_is_no_permutation_is_refused(name, order):
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"must be a permutation of range\(48\)"):
        permute_neurons_(find_sites(model)[0], order)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapted_neurons_are_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("bert")
    get_peft_model(model, LoraConfig(target_modules=["intermediate.dense"], r=4))
    with pytest.raises(ValueError, match="holds .*lora_A.* beside its weight and bias.* merge adapters"):
        permute_neurons_(find_sites(model)[0], torch.arange(48))


def test_sharded_neurons_are_refused():
    """Parameters of any other class than nn.Parameter: DTensor, quantised tensors."""

    class Shard(nn.Parameter):
        pass

    model = tiny_model("llama")
    site = find_sites(model)[0]
    site.down.weight = Shard(site.down.weight.data)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="down_proj.weight is a Shard"):
        permute_neurons_(site, torch.arange(48).flip(0))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
