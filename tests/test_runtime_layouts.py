"""FFNs of every layout give by the sparse implementations what they give masked."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import convert, distance, run
from torch import nn

from moefy_hf.measure.made_up_inputs import made_up_batch
from moefy_hf.runtime.backends import BACKENDS

sys.path.append(str(Path(__file__).parent / "registry"))
from tiny_registry import tiny_model  # noqa: E402

SEPARABLE = {  # model type -> how its FFNs are laid out
    "lfm2": "gated, calls a function",
    "moonshine": "ungated in the encoder, fused with up first in the decoder",
    "falcon_h1": "gated, up runs before the gate",
    "nemotron": "ungated",
    "arcee": "ungated",
    "xlm": "ungated, its activation is a function that it keeps",
    "albert": "one for all layers, held by the layer",
    "lilt": "two in a layer",
}
TOGETHER = {"bitnet": "ffn_sub_norm", "gemma3n_text": "_gaussian_topk"}  # what takes all neurons together


def moefied(model_type: str):
    """A MoEfied model with two experts of eight neurons per FFN, and inputs for four tokens."""
    model = tiny_model(model_type)
    convert(model, 2)
    return model.requires_grad_(False), made_up_batch(model, tokens=2, batch=2)


def computed(monkeypatch) -> list[str]:
    """The backends that compute an FFN from here on."""
    found = []
    for name, backend in BACKENDS.items():

        def counted(self, x, most, compute=backend.compute, name=name):
            y = compute(self, x, most)
            found.append(name)
            return y

        monkeypatch.setattr(backend, "compute", counted)
        monkeypatch.setattr(backend, "most_tokens", None)
    return found


def forwards(model, inputs) -> int:
    """How often FFNs run in one call."""
    seen = []
    hooks = [site.down.register_forward_hook(lambda *_: seen.append(1)) for site in model.moe_sites()]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return len(seen)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("implementation", ["torch", "cpu"])
@pytest.mark.parametrize("model_type", SEPARABLE)
def test_every_layout_gives_the_same(model_type, implementation, compensated, monkeypatch):
    model, inputs = moefied(model_type)
    for site in model.moe_sites() if compensated else ():
        site.act.compensate_(torch.randn(site.sizes[1]))
    masked, uses = run(model, inputs), forwards(model, inputs)
    found = computed(monkeypatch)
    model.set_moe_implementation(implementation)
    assert distance(run(model, inputs), masked) < 1e-5
    assert found == [implementation] * uses
    model.set_moe_implementation("masked")
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), masked, strict=True))


@pytest.mark.parametrize("model_type", TOGETHER)
def test_neurons_that_are_taken_together_stay_masked(model_type, monkeypatch):
    model, inputs = moefied(model_type)
    masked, found = run(model, inputs), computed(monkeypatch)
    with pytest.raises(ValueError, match=f"its {TOGETHER[model_type]} takes all neurons of a token together"):
        model.set_moe_implementation("torch")
    model.set_moe_implementation("auto")
    assert distance(run(model, inputs), masked) < 1e-5
    assert len(found) == sum(site.spec.together is None for site in model.moe_sites())


def test_an_interrupted_call_leaves_nothing_to_an_inline_activation():
    model, inputs = moefied("lfm2")
    masked = run(model, inputs)
    model.set_moe_implementation("cpu")
    site = model.moe_sites()[0]
    with torch.no_grad():
        site.first(torch.randn(1, 1, site.sizes[0]))  # and nothing after it
    model.set_moe_implementation("masked")
    assert distance(run(model, inputs), masked) == 0


@pytest.mark.parametrize("model_type", ["t5", "bart", "modernbert", "speech_to_text"])
def test_with_dropout_of_neurons_calls_are_masked(model_type, monkeypatch):
    model, inputs = moefied(model_type)
    for module in model.train().modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in key or key in ("p", "layerdrop")):
                setattr(module, key, 0.0)
    found = computed(monkeypatch)
    model.set_moe_implementation("cpu")
    run(model, inputs)
    assert len(found) == len(model.moe_sites())
    for site in model.moe_sites():
        dropout = getattr(site.owner, site.spec.dropout)
        owner, name = (dropout, "p") if isinstance(dropout, nn.Dropout) else (site.owner, site.spec.dropout)
        monkeypatch.setattr(owner, name, 0.5)
    found.clear()
    run(model, inputs)
    assert not found
