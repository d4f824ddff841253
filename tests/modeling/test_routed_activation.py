"""The routed activation masks exactly the unselected neurons, and refuses whatever would make it mask wrongly."""

import copy
import gc
import io
import pickle
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import NAMES, convert, distance, run, tensors, tiny_inputs, tiny_model, tiny_moefied
from torch import nn

from moefy_hf.modeling.routed_activation import RoutedActivation
from moefy_hf.modeling.router_base import Router
from moefy_hf.modeling.selection import TopK

D, E, M = 6, 4, 3


class FixedRouter(Router):
    """The same scores for every token: experts 2 and 0 are best."""

    def __init__(self):
        super().__init__(D, E)
        self.scores = nn.Parameter(torch.tensor([2.0, 0.0, 3.0, 1.0]), requires_grad=False)

    def score(self, x):
        return self.scores.expand(*x.shape[:-1], E)


KEPT = torch.tensor([True, False, True, False]).repeat_interleave(M)  # neurons, for k = 2


class FFN(nn.Module):
    def __init__(self, act: nn.Module, gated: bool, k: int = 2):
        super().__init__()
        self.gate = nn.Linear(D, E * M) if gated else None
        self.up, self.down = nn.Linear(D, E * M), nn.Linear(E * M, D)
        self.act = RoutedActivation(act, FixedRouter(), M, TopK(k))
        self.act.connect_(self.up if self.gate is None else self.gate)

    def neurons(self, x):
        return self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)

    def forward(self, x):
        return self.down(self.neurons(x))


ACTS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "sigmoid": nn.Sigmoid()}


@pytest.fixture(params=[(act, gated) for act in ACTS for gated in (False, True)], ids=str)
def ffn(request) -> FFN:
    act, gated = request.param
    torch.manual_seed(0)
    return FFN(copy.deepcopy(ACTS[act]), gated)


@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (2, 3, 4, D), (0, D)])
def test_masks_the_unselected_neurons(ffn, shape):
    x = torch.randn(shape)
    neurons = ffn.neurons(x)
    ffn.act.selection = TopK(E)
    everything = ffn.neurons(x)
    assert torch.equal(neurons, torch.where(KEPT, everything, 0.0))
    inner = ffn.act.inner
    dense = inner(ffn.up(x)) if ffn.gate is None else inner(ffn.gate(x)) * ffn.up(x)
    assert torch.equal(everything, dense)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("act", ACTS)
def test_what_is_dropped_cannot_poison(act, bad):
    """0 * inf is nan: dropped neurons must be replaced, not multiplied; in the gradient as well."""
    torch.manual_seed(0)
    ffn, x = FFN(copy.deepcopy(ACTS[act]), gated=False), torch.randn(5, D, requires_grad=True)
    clean = ffn(x)
    (clean_gradient,) = torch.autograd.grad(clean.sum(), x)
    with torch.no_grad():
        ffn.up.bias[~KEPT] = bad
    out = ffn(x)
    assert torch.equal(out, clean)
    out.sum().backward()
    torch.testing.assert_close(x.grad, clean_gradient)
    assert all(p.grad.isfinite().all() for p in ffn.parameters() if p.requires_grad)
    with torch.no_grad():
        ffn.up.bias[KEPT] = bad
    assert not torch.equal(ffn(x), clean)  # the plant works


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_dropped_gate_cannot_poison(bad):
    ffn, x = FFN(nn.SiLU(), gated=True), torch.randn(5, D)
    clean = ffn(x)
    with torch.no_grad():
        ffn.gate.bias[~KEPT] = bad
    assert torch.equal(ffn(x), clean)


def test_gradients_reach_kept_neurons_only(ffn):
    ffn(torch.randn(20, D)).square().sum().backward()
    rows = [ffn.up.weight.grad, ffn.up.bias.grad.unsqueeze(1), ffn.down.weight.grad.t()]
    rows += [] if ffn.gate is None else [ffn.gate.weight.grad, ffn.gate.bias.grad.unsqueeze(1)]
    for gradient in rows:  # (f, ...)
        assert (gradient[~KEPT] == 0).all() and (gradient[KEPT].abs().sum(1) > 0).all()
    assert ffn.act.router.scores.grad is None


@pytest.mark.parametrize("name", ["bert", "t5-gated", "gpt2", "phi3", "bert-sigmoid"])
def test_gradients_equal_masking_by_hand(name):
    """The whole model's gradient at k < E is that of a dense model whose `down` inputs are masked likewise."""
    model, inputs = tiny_moefied(name), tiny_inputs(name)
    routed = model.moe_sites()
    masks = []
    handles = [site.down.register_forward_pre_hook(lambda m, args: masks.append(args[0] != 0)) for site in routed]
    model(**inputs)[0].square().mean().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model.set_selection(k=1.0)
    for site, mask in zip(routed, masks, strict=True):
        site.down.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,))
    model(**inputs)[0].square().mean().backward()
    assert gradients.keys() == {key for key, p in model.named_parameters() if p.grad is not None}
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[key], p.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_an_input_it_did_not_see_is_an_error(ffn):
    first = ffn.up if ffn.gate is None else ffn.gate
    with pytest.raises(RuntimeError, match="did not see its FFN's input"):
        ffn.act(torch.randn(2, E * M))
    ffn(torch.randn(2, D))
    with pytest.raises(RuntimeError, match="did not see"):  # released after the call
        ffn.act(torch.randn(2, E * M))
    first(torch.randn(3, D))
    with pytest.raises(RuntimeError, match="did not see"):  # another call's input
        ffn.act(torch.randn(2, E * M))
    ffn(torch.randn(2, D))  # and no trace of all this


def test_a_replaced_linear_is_followed():
    """At the next call of its FFN; an activation that runs before that is an error until `connect_` is called."""
    model, inputs = tiny_moefied("bert"), tiny_inputs("bert")
    expected = run(model, inputs)
    layer = model.encoder.layer[0].intermediate
    old, layer.dense = layer.dense, nn.Linear(16, 48)
    layer.dense.load_state_dict(old.state_dict())
    with pytest.raises(RuntimeError, match=r"call model.connect_\(\)"):
        layer(torch.randn(1, 2, 16))
    assert distance(run(model, inputs), expected) == 0
    layer.dense = old
    model.connect_()
    assert layer(torch.randn(1, 2, 16)).shape == (1, 2, 48) and len(old._forward_pre_hooks) == 1


def test_connecting_twice_observes_once():
    model, inputs = tiny_moefied("llama"), tiny_inputs("llama")
    model.connect_()
    model.connect_()
    for site in model.moe_sites():
        assert len(site.first._forward_pre_hooks) == 1
    run(model, inputs)


def test_shards_are_refused():
    """Tensor parallelism leaves each rank some of the neurons; they are not those of the first experts."""
    ffn = FFN(nn.ReLU(), gated=False)
    ffn.up = nn.Linear(D, E * M // 2)
    ffn.act.connect_(ffn.up)
    with pytest.raises(RuntimeError, match=r"expected 12 neurons \(4 experts of 3\), got 6: tensor-parallel"):
        ffn(torch.randn(2, D))


def test_activations_with_parameters_are_refused():
    with pytest.raises(ValueError, match="PReLU has parameters"):
        FFN(nn.PReLU(), gated=False)


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2", "modernbert"])
def test_a_bypassed_activation_is_an_error(name):
    """A fused MLP (Liger's, say) computes everything in one kernel; without a check, the model would be dense."""
    model, inputs = tiny_moefied(name), tiny_inputs(name)
    expected = run(model, inputs)
    site = model.moe_sites()[1]
    routed = site.act
    parent = model.get_submodule(f"{site.name}.{site.spec.act}".rpartition(".")[0])
    act = site.spec.act.rpartition(".")[2]

    class Fused(nn.Module):
        """Has the routed activation's place, and calls the plain one."""

        def __init__(self):
            super().__init__()
            self.routed = routed

        def forward(self, h):
            return self.routed.inner(h)

    setattr(parent, act, Fused())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{site.name}: the activation of this routed FFN never ran"):
            run(model, inputs)
        assert routed.observed.x is None
    setattr(parent, act, routed)
    assert distance(run(model, inputs), expected) == 0


def test_a_fused_forward_is_an_error():
    model, inputs = tiny_moefied("llama"), tiny_inputs("llama")

    def fused(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    model.layers[1].mlp.forward = types.MethodType(fused, model.layers[1].mlp)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp: the activation of this routed FFN never ran"):
        run(model, inputs)


def test_a_chunked_ffn_routes_every_chunk():
    """BERT can run its FFN on a few tokens at a time: several hand-overs in one call of the layer."""
    inputs = tiny_inputs("bert")
    whole, chunked = tiny_moefied("bert"), tiny_model("bert", chunk_size_feed_forward=1)
    convert(chunked, 2)
    assert distance(run(chunked, inputs), run(whole, inputs)) < 1e-6


def test_nothing_is_held_after_the_call():
    model, inputs = tiny_moefied("bert"), tiny_inputs("bert")
    seen = []
    model.moe_sites()[0].first.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    run(model, inputs)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    assert all(site.act.observed.x is None for site in model.moe_sites())


def test_threads_share_a_model():
    """Eight threads, each with inputs of its own; with the hand-over in a plain attribute they would mix them up."""
    model = tiny_moefied("bert")
    inputs = [tiny_inputs("bert", seed=seed) for seed in range(8)]
    expected = [run(model, each) for each in inputs]
    start = threading.Barrier(8)

    def worst(i: int) -> float:
        start.wait()
        return max(distance(run(model, inputs[i]), expected[i]) for _ in range(15))

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(worst, range(8))) < 1e-6


def saved_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_whole}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_copies_are_independent(name, how):
    model, inputs = tiny_moefied(name), tiny_inputs(name)
    expected = run(model, inputs)
    other = COPIES[how](model)
    assert type(other) is type(model) and distance(run(other, inputs), expected) == 0
    other.set_selection(k=1.0)
    assert distance(run(other, inputs), expected) > 1e-3
    with torch.no_grad():
        for site, old in zip(other.moe_sites(), model.moe_sites(), strict=True):
            assert site.act.observed is not old.act.observed
            site.act.router.weight.neg_()
            assert site.act.tap is not None and len(site.first._forward_pre_hooks) == 1
    other.connect_()
    assert all(len(site.first._forward_pre_hooks) == 1 for site in other.moe_sites())
    other.set_selection(k=2)
    assert distance(run(other, inputs), expected) > 1e-3
    assert distance(run(model, inputs), expected) == 0
    model.connect_()
    assert distance(run(model, inputs), expected) == 0


@pytest.mark.parametrize("name", ["bert", "llama", "t5-gated"])
def test_autocast(name):
    model, inputs = tiny_moefied(name), tiny_inputs(name)
    full, scores = run(model, inputs), []
    for site in model.moe_sites():
        site.act.router.register_forward_hook(lambda module, args, output: scores.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(model, inputs)
    assert scores and all(each.dtype == torch.float32 for each in scores)
    assert all(tensor.isfinite().all() for tensor in low)
    assert 0 < (low[0].float() - full[0]).abs().mean() < 0.1  # routing may flip at close scores


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2", "vit"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model, inputs = tiny_moefied(name).train(), tiny_inputs(name)
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads() if reentrant and name != "vit" else None
        calls = []
        handle = model.moe_sites()[0].first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        loss = model(**inputs)[0].square().mean()
        loss.backward()
        handle.remove()
        assert len(calls) == 1 + checkpointing  # recomputed
        losses.append(loss.item())
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and gradients[0].keys() == gradients[1].keys()
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in gradients[0].values())
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=1e-5, atol=rounding, msg=key)
    assert all(site.act.observed.x is None for site in model.moe_sites())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiles_without_graph_breaks(name):
    """The graph is captured whole and run without code generation, which would only test the compiler."""
    model, inputs = tiny_moefied(name), tiny_inputs(name)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in (1, 2):  # other inputs on the same graph: nothing observed while tracing may be baked in
            inputs = tiny_inputs(name, seed=seed)
            assert distance(tensors(compiled(**inputs)), run(model, inputs)) < 1e-5
        model.set_selection(k=1.0)
        assert distance(tensors(compiled(**inputs)), run(model, inputs)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_trains_at_few_experts(name):
    """A few steps at k < E lower a loss on every architecture, and routers stay as they are."""
    model, inputs = tiny_moefied(name).train(), tiny_inputs(name)
    routers = {key: value.clone() for key, value in model.state_dict().items() if ".router." in key}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (tensors(model(**inputs))[0] - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in routers.items())
