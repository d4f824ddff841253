"""What only looks like an FFN is left alone, and the reason is given."""

import re

import pytest
from handmade import Layer, Plain, Stack
from lookalikes import (
    Bottleneck,
    ConvMlp,
    ExpertMLP,
    Experts,
    LearnedMlp,
    MixingMlp,
    PerLayerEmbeddings,
    PredictionHead,
    SharedExpert,
    SquaredMlp,
    TwoStepMlp,
    VisualProjector,
    WideAdapter,
    WideAttention,
)
from torch import nn

from moefy_hf.discovery.search import search

NATIVE = "it is part of a native Mixture of Experts"
OTHER = r"it computes something else than down\(act\(up\(x\)\)\)"
REASONS = {
    WideAdapter: "it is an adapter",
    Bottleneck: "it is a bottleneck of 3 neurons in a width of 12",
    VisualProjector: "it is what connects two towers",
    PredictionHead: "it is a head",
    ExpertMLP: NATIVE,
    SharedExpert: NATIVE,
    Experts: NATIVE,
    ConvMlp: r"it has a convolution \(Conv1d\) in it",
    LearnedMlp: "its activation PReLU has parameters",
    SquaredMlp: OTHER,
    MixingMlp: OTHER,
    TwoStepMlp: r"what it computes cannot be told: TwoStepMlp does not run on one tensor by itself \(TypeError\)",
}


@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
def test_what_looks_like_an_ffn(kind):
    """It lies in a layer beside an FFN, which is found."""
    result = search(Stack(Layer(ffn=Plain(), odd=kind())))
    assert [site.name for site in result.sites] == ["layers.0.ffn"]
    assert [left.name for left in result.left] == ["layers.0.odd"]
    assert re.match(REASONS[kind], result.left[0].reason)


@pytest.mark.parametrize("name", ["experts", "shared_expert", "adapter", "multi_modal_projector", "lm_head"])
def test_a_name_above_it_is_enough(name):
    """The class of an expert may be that of the dense layers' FFNs."""
    result = search(Stack(Layer(ffn=Plain(), **{name: nn.ModuleList([Plain(), Plain()])})))
    assert [site.name for site in result.sites] == ["layers.0.ffn"]
    assert [left.name for left in result.left] == [f"layers.0.{name}.{i}" for i in range(2)]


def test_attention_is_no_ffn():
    result = search(Stack(Layer(ffn=Plain(), attention=WideAttention())))
    assert [site.name for site in result.sites] == ["layers.0.ffn"] and not result.left


def test_a_gate_on_embeddings_is_no_ffn():
    result = search(Stack(PerLayerEmbeddings()))
    assert [site.name for site in result.sites] == ["layers.0.mlp"] and not result.left
