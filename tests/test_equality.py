"""An FFN that does not compute what it was taken for is not converted, and the model stays exactly as it was."""

import copy
import json

import pytest
import torch
import transformers
from batches import text_batches
from tiny import distance, run, tiny_inputs, tiny_model
from torch import nn

from moefy_hf import MoEficationConfig, moefy_
from moefy_hf.conversion import pipeline
from moefy_hf.conversion.equality import DenseReference
from moefy_hf.errors import UnsupportedModel
from moefy_hf.modeling.ffn_sites import find_sites

FREE = {"splitter": "random", "router": "random"}
PROBED = 6  # rows, by which the probe sees what a module computes


class LyingMlp(nn.Module):
    """Computes what it seems to on small inputs alone, so that the probe is fooled."""

    def __init__(self, d: int, f: int, at: str):
        super().__init__()
        self.fc1, self.act, self.fc2, self.at = nn.Linear(d, f), nn.GELU(), nn.Linear(f, d), at

    def forward(self, x):
        scale = 1.1 if x.shape[:-1].numel() > PROBED else 1.0
        h = self.act(self.fc1(x))
        return self.fc2(h * scale) if self.at == "neurons" else self.fc2(h) * scale


def lying_in_a_module() -> nn.Module:
    model = tiny_model("gpt2", "AutoModelForCausalLM")
    for block in model.transformer.h:
        block.mlp = LyingMlp(16, 48, "neurons").eval()
    return model


def lying_in_a_layer() -> nn.Module:
    """BERT's layer is not run by itself: its forward may do what it likes."""

    def squared(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states)) ** 2

    model = tiny_model("bert", "AutoModelForMaskedLM")
    kind = type(model.bert.encoder.layer[1].intermediate)
    model.bert.encoder.layer[1].intermediate.__class__ = type("Squared", (kind,), {"forward": squared})
    return model


LIARS = {  # name -> model, the FFN that lies, what it is taken for
    "gpt2": (lying_in_a_module, "transformer.h.0.mlp", r"LyingMlp does not compute fc2\(act\(fc1\(x\)\)\)"),
    "bert": (
        lying_in_a_layer,
        "bert.encoder.layer.1",
        r"BertLayer does not compute output.dense\(intermediate.intermediate_act_fn\(intermediate.dense\(x\)\)\)",
    ),
}


def state_of(model: nn.Module) -> dict:
    """Everything that a conversion changes."""
    return {
        "class": type(model),
        "name": model.name_or_path,
        "no_split": model._no_split_modules,
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "attributes": [{*vars(module)} for module in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "settings": {*vars(model.config)},
        "addresses": {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def assert_as_it_was(model: nn.Module, before: dict, weights: dict, outputs: list, inputs: dict) -> None:
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert distance(run(model, inputs), outputs) == 0


@pytest.mark.parametrize("data", [False, True], ids=["made-up batch", "calibration"])
@pytest.mark.parametrize("name", LIARS)
def test_a_wrong_match_is_refused_by_name(name, data):
    make, site, formula = LIARS[name]
    model, inputs = make(), tiny_inputs(name)
    assert site in [each.name for each in find_sites(model)]
    outputs = run(model, inputs)
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    batches = text_batches(8, labels="causal") if data else None
    config = MoEficationConfig(expert_size=8, **FREE, allocation="uniform")
    with pytest.raises(UnsupportedModel, match=f"^{site}: this {formula}; convert other FFNs"):
        moefy_(model, config, batches, progress=False)
    assert_as_it_was(model, before, weights, outputs, inputs)


def test_the_other_ffns_can_be_converted():
    model, inputs = lying_in_a_layer(), tiny_inputs("bert")
    outputs = run(model, inputs)
    moefy_(model, MoEficationConfig(expert_size=8, layers=[0], k=1.0, **FREE))
    assert distance(run(model, inputs), outputs) < 1e-5
    assert [site.name for site in model.moe_sites()] == ["bert.encoder.layer.0"]


def test_what_the_module_does_with_its_output_is_its_own(monkeypatch):
    """A scale of the whole FFN, as Granite has it, is no business of a split."""
    model, inputs = tiny_model("gpt2"), tiny_inputs("gpt2")
    mlp = type(model.h[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 1.1 * forward(self, x))
    outputs = run(model, inputs)
    moefy_(model, MoEficationConfig(expert_size=8, k=1.0, **FREE))
    assert distance(run(model, inputs), outputs) < 1e-5


def half_of_the_experts(monkeypatch):
    install = pipeline.install_routers_

    def installed(model, section):
        install(model, section).set_selection(type="top_k", k=0.5, allocation="uniform")
        return model

    monkeypatch.setattr(pipeline, "install_routers_", installed)
    return "after routers were put into its FFNs all experts together are not the dense"


def the_second_cannot_be_permuted(monkeypatch):
    permute, permuted = pipeline.permute_neurons_, []

    def permute_once(site, order, optimizer=None):
        if len(permuted) == 1:
            permuted.append(None)
            raise UnsupportedModel("enough")
        permuted.append(site)
        permute(site, order)

    monkeypatch.setattr(pipeline, "permute_neurons_", permute_once)
    return "enough"


def one_matrix_is_forgotten(monkeypatch):
    permute = pipeline.permute_neurons_

    def permute_others(site, order, optimizer=None):
        down = site.down.weight.detach().clone()
        permute(site, order)
        with torch.no_grad():
            site.down.weight.copy_(down)

    monkeypatch.setattr(pipeline, "permute_neurons_", permute_others)
    return "after its neurons were permuted all experts together are not the dense"


@pytest.mark.parametrize("fault", [half_of_the_experts, the_second_cannot_be_permuted, one_matrix_is_forgotten])
@pytest.mark.parametrize("name", ["bert", "llama", "phi3", "gpt2"])
def test_a_step_that_goes_wrong_is_undone(name, fault, monkeypatch):
    """Were there a fault in what installs routers or permutes neurons, it would be noticed, and undone."""
    model, inputs = tiny_model(name), tiny_inputs(name)
    outputs = run(model, inputs)
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    message = fault(monkeypatch)
    with pytest.raises(UnsupportedModel, match=message):
        moefy_(model, MoEficationConfig(expert_size=8, **FREE))
    assert_as_it_was(model, before, weights, outputs, inputs)


def test_a_reference_is_the_model_without_chance():
    """Dropout is off, and the model's mode and the global random state are as they were."""
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=99, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        )
    ).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reference = DenseReference(model, find_sites(model), None)
    reference.compare("nothing was done")
    assert torch.equal(torch.rand(3), expected) and model.training
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0] += 1
    with pytest.raises(UnsupportedModel, match="after a change all experts together are not the dense BertModel"):
        reference.compare("a change")
