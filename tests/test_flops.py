"""FLOPs: counted by hand for BERT and Llama, routers included, padding included."""

import pytest
import torch
from batches import text_batches
from tiny import tiny_model

from moefy_hf import MoEficationConfig, moefy_
from moefy_hf.measure.flops import ModelFlops, ffn_flops, model_flops, routed_flops
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.routers import ROUTERS

D, F, EXPERTS, VOCAB, LAYERS = 16, 48, 6, 99, 2


def routed(name: str, head: str = "AutoModel", router: str = "random", k=1.0, **changes):
    model = tiny_model(name, head, **changes)
    selection = {"type": "top_k", "k": k, "allocation": "uniform"}
    moefy_(model, MoEficationConfig(num_experts=EXPERTS, splitter="random", router=router, selection=selection))
    return model


def batch(rows: int = 3, length: int = 8, **kwargs) -> dict:
    return text_batches(1, rows=rows, length=length, **kwargs)[0]


@pytest.mark.parametrize(("name", "matrices"), [("bert", 2), ("gpt2", 2), ("llama", 3), ("phi3", 3), ("t5-gated", 3)])
def test_ffn(name, matrices):
    for site in find_sites(tiny_model(name)):
        assert ffn_flops(site) == 2 * matrices * D * F


def test_ffn_of_different_widths():
    assert [ffn_flops(site) for site in find_sites(tiny_model("bart-uneven"))] == [4 * D * 32] * 2 + [4 * D * 64] * 2


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("name", "matrices"), [("bert", 2), ("llama", 3)])
def test_routed(name, matrices, router):
    model = tiny_model(name)
    config = MoEficationConfig(num_experts=EXPERTS, splitter="random", router="random")
    moefy_(model, config)
    site = model.moe_sites()[0]
    site.act.router = ROUTERS[router].of(site.weights(), EXPERTS)
    site.act.router.read_from_(site.weights, 0)
    rows = {  # of how many numbers the matrices consist
        "mlp": D * EXPERTS + EXPERTS * EXPERTS,
        "low_rank": EXPERTS * (D + EXPERTS),  # a rank of 64 would be more than full
        "norm_regression": 128 * (D + EXPERTS),
        "analytic": (matrices - 1) * D * EXPERTS,
        "partial_input": (matrices - 1) * 6 * F,  # 40 % of the 16 entries of x
    }
    cost = 2 * rows.get(router, D * EXPERTS)
    dense = 2 * matrices * D * F
    for k in (1, 2, 5):
        twice = cost * k / EXPERTS if router == "partial_input" else 0  # experts that run do that work anyway
        assert routed_flops(site, k) == pytest.approx(dense * k / EXPERTS + cost - twice)
    assert routed_flops(site, EXPERTS) == dense == ffn_flops(site)  # nothing is routed then
    assert routed_flops(find_sites(tiny_model(name))[0], 3) == dense  # an FFN that is no MoE


def test_ratio():
    ffn, whole = ModelFlops(total=100.0, ffn=60.0, tokens=()).ratio(15.0)
    assert (ffn, whole) == (0.25, 0.55)
    assert ModelFlops(total=100.0, ffn=60.0, tokens=()).ratio(60.0) == (1, 1)


def bert_by_hand(rows: int, length: int) -> int:
    """Eager attention: projections, scores, values; FFN; a pooler on one token per text."""
    tokens = rows * length
    attention = 4 * 2 * tokens * D * D + 2 * (2 * rows * length * length * D)
    return LAYERS * (attention + tokens * 4 * D * F) + rows * 2 * D * D


def llama_by_hand(rows: int, length: int) -> int:
    """Two heads of 8 share one key and value head; an output matrix for all tokens."""
    tokens, kv = rows * length, 8
    attention = 2 * tokens * D * (2 * D + 2 * kv) + 2 * (2 * rows * length * length * D)
    return LAYERS * (attention + tokens * 6 * D * F) + tokens * 2 * D * VOCAB


@pytest.mark.parametrize("shape", [(3, 8), (1, 5), (2, 17)])
def test_bert(shape):
    model = tiny_model("bert", attn_implementation="eager")
    found = model_flops(model, batch(*shape))
    assert found.total * shape[0] * shape[1] == pytest.approx(bert_by_hand(*shape))
    assert found.ffn == LAYERS * 4 * D * F


@pytest.mark.parametrize("shape", [(3, 8), (2, 17)])
def test_llama(shape):
    model = tiny_model("llama", "AutoModelForCausalLM", attn_implementation="eager")
    found = model_flops(model, batch(*shape))
    hand = llama_by_hand(*shape)
    # the rotary angles are one small product of their own: frequencies times positions
    assert found.total * shape[0] * shape[1] == pytest.approx(hand, rel=2e-3)
    assert found.total * shape[0] * shape[1] >= hand
    assert found.ffn == LAYERS * 6 * D * F


def test_fused_attention_is_counted_too():
    eager, fused = (
        model_flops(tiny_model("bert", attn_implementation=kind), batch()).total for kind in ("eager", "sdpa")
    )
    assert fused == pytest.approx(eager)


def test_a_router_that_reuses_expert_compute_beside_shared_ones():
    """A neuron that is not computed has read 6 of 16 entries of x."""
    model = tiny_model("llama")
    selection = {"type": "top_k", "k": 4, "allocation": "uniform"}
    settings = {"splitter": "random", "router": "partial_input", "selection": selection}
    moefy_(model, MoEficationConfig(num_experts=EXPERTS, **settings))
    for site in model.moe_sites():
        site.act.shared, site.act.router.num_experts = 2, EXPERTS - 2
        site.act.router.shared = 2
        assert routed_flops(site, 4) == pytest.approx(6 * D * 32 + 4 * 6 * 16)
        assert routed_flops(site, 2) == pytest.approx(6 * D * 16 + 4 * 6 * 32)


@pytest.mark.parametrize("router", ["random", "similarity", "partial_input"])
@pytest.mark.parametrize("k", [1, 3, EXPERTS])
def test_a_moefied_model_is_counted_as_its_dense_self(router, k):
    dense = model_flops(tiny_model("bert"), batch())
    assert model_flops(routed("bert", router=router, k=k), batch()) == dense


def test_only_routed_layers_lose_their_routers():
    model = routed("bert", k=[1, EXPERTS])
    assert model_flops(model, batch()) == model_flops(tiny_model("bert"), batch())


def test_per_token_of_the_longer_side_of_an_encoder_decoder():
    model = tiny_model("t5", "AutoModelForSeq2SeqLM")
    text = batch(rows=2, length=8)
    found = model_flops(model, {**text, "decoder_input_ids": text["input_ids"][:, :4]})
    assert found.ffn == pytest.approx((2 * 8 + 2 * 4) * 4 * D * F / 8)
    assert found.tokens == (1.0, 1.0, 0.5, 0.5)


def test_each_ffn_costs_what_its_own_tokens_cost():
    """A short decoder's budget matters less than its encoder's."""
    model = routed("t5", "AutoModelForSeq2SeqLM", k=[1, EXPERTS, 3, 2])
    text = batch(rows=2, length=8)
    found = model_flops(model, {**text, "decoder_input_ids": text["input_ids"][:, :4]})
    ffn, router = 4 * D * F, 2 * D * EXPERTS
    by_hand = (ffn / EXPERTS + router) + ffn + (ffn / 2 + router) / 2 + (ffn / 3 + router) / 2
    computed = {site.key: site.act.k for site in model.moe_sites()}
    assert found.routed(find_sites(model), computed) == pytest.approx(by_hand)
    stock = tiny_model("t5", "AutoModelForSeq2SeqLM")
    assert found.routed(find_sites(stock), {}) == pytest.approx(found.ffn)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training):
    model = tiny_model("bert").train(training)
    model_flops(model, batch())
    with pytest.raises(IndexError):
        model_flops(model, {"input_ids": torch.tensor([[1000]])})
    assert model.training is training
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == 0
