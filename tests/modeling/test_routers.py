"""Routers score what they say, start from their experts, learn their targets, and keep their own precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import convert, tiny_model
from torch import nn

from moefy_hf.modeling.ffn_weights import FfnWeights
from moefy_hf.modeling.router_base import activation_mass, expert_centres, output_norm, prior_affinity
from moefy_hf.modeling.routers import ROUTERS, router_class
from moefy_hf.modeling.routers_from_weights import AnalyticRouter, PartialInputRouter
from moefy_hf.modeling.routers_trained import LowRankRouter

D, E, M = 6, 4, 3


def cosines(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cosine_similarity(x, centre, dim=-1) for centre in centres], -1)


def centres(ffn: FfnWeights) -> torch.Tensor:
    """(E, d): the mean direction of the rows by which each expert's neurons fire."""
    keys = (ffn.up if ffn.gate is None else ffn.gate).view(E, M, D)
    return torch.stack([sum(key / key.norm() for key in expert) / M for expert in keys])


def representatives(x: torch.Tensor, ffn: FfnWeights) -> torch.Tensor:
    """|activation| of each expert's neuron that is nearest to its centre."""
    keys, neurons = F.normalize(ffn.keys, dim=-1).view(E, M, D), ffn.neurons(x).unflatten(-1, (E, M))
    nearest = [(keys[e] - centres(ffn)[e]).norm(dim=-1).argmin() for e in range(E)]
    return torch.stack([neurons[..., e, nearest[e]].abs() for e in range(E)], -1)


def partial_outputs(x: torch.Tensor, ffn: FfnWeights) -> torch.Tensor:
    """What each expert's neurons give of the 2 largest of 6 entries of x, added as if they were orthogonal."""
    scores = torch.zeros(len(x), E)
    for token, row in zip(x, scores, strict=True):
        least = token.abs().sort().values[-2]
        neurons = ffn.neurons(torch.where(token.abs() >= least, token, 0))
        for e in range(E):
            row[e] = sum((ffn.down[:, n] * neurons[n]).norm() ** 2 for n in range(e * M, (e + 1) * M)) ** 0.5
    return scores


# (x, ffn) -> what a router that was initialised from its experts must compute, up to a positive factor per token
SCORES = {
    "linear": lambda x, ffn: x @ centres(ffn).T,
    "low_rank": lambda x, ffn: x @ centres(ffn).T,  # of full rank, with this few experts
    "mlp": lambda x, ffn: (F.normalize(x, dim=-1) @ centres(ffn).T).tanh(),
    "prior_approximate": lambda x, ffn: x @ centres(ffn).T,
    "sigmoid": lambda x, ffn: x @ centres(ffn).T,
    "pre_gated": lambda x, ffn: x @ centres(ffn).T,
    "relu_rmsnorm": lambda x, ffn: x @ centres(ffn).T,
    "similarity": lambda x, ffn: torch.stack([F.cosine_similarity(x, centre, dim=-1) for centre in centres(ffn)], -1),
    "mean_gate": lambda x, ffn: x @ ffn.keys.view(E, M, D).mean(1).T,
    "analytic": representatives,
    "partial_input": partial_outputs,
    "norm_regression": None,  # nothing about the experts
    "random": None,
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts(gated: bool, bias: bool = True) -> FfnWeights:
    up_bias, gate_bias = (noise(E * M, seed=5), noise(E * M, seed=6)) if bias else (None, None)
    gate = (noise(E * M, D, seed=3), gate_bias) if gated else (None, None)
    return FfnWeights(noise(E * M, D), noise(D, E * M, seed=4), nn.GELU(), up_bias, *gate)


def router_of(name: str, ffn: FfnWeights) -> nn.Module:
    router = ROUTERS[name].of(ffn, E)
    router.read_from_(lambda: ffn, 0)
    router.reset_parameters()
    return router


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return router_of(name, experts(gated=True))


def test_every_router_is_tested():
    assert set(ROUTERS) == set(SCORES)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_initialised_from_the_experts(name, gated, bias):
    ffn, x = experts(gated, bias), noise(50, D, seed=1)
    router = router_of(name, ffn)
    before = [weight.clone() for weight in router.parameters()]
    router.init_from_experts_(ffn)
    scores = router(x)
    if SCORES[name] is None:
        assert all(torch.equal(a, b) for a, b in zip(router.parameters(), before, strict=True))
        return
    expected = SCORES[name](x, ffn)
    torch.testing.assert_close(F.normalize(scores, dim=-1), F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.argsort(-1), expected.argsort(-1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_scores_follow_their_experts(name, gated):
    """Experts in another order, neurons in another order within them: the same scores, in the experts' new order."""
    ffn, x = experts(gated), noise(20, D, seed=1)
    turn = torch.randperm(E, generator=torch.Generator().manual_seed(0))
    inner = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    order = torch.arange(E * M).view(E, M)[turn][:, inner].flatten()
    gate = (None, None) if ffn.gate is None else (ffn.gate[order], ffn.gate_bias[order])
    moved = FfnWeights(ffn.up[order], ffn.down[:, order], ffn.act, ffn.up_bias[order], *gate)
    scores = []
    for each in (ffn, moved):
        router = router_of(name, each)
        router.init_from_experts_(each)
        scores.append(router(x))
    if SCORES[name] is not None:
        torch.testing.assert_close(scores[1], scores[0][:, turn], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_strengths_are_not_negative_and_keep_the_order(name):
    router = make(name)
    scores = router(noise(50, D))
    strengths = router.strengths(scores)
    assert strengths.shape == scores.shape and (strengths >= 0).all() and strengths.isfinite().all()
    assert (strengths.gather(-1, scores.argsort(-1)).diff(dim=-1) >= 0).all()


def test_an_expert_of_one_neuron_is_that_neuron():
    """Then the representative is the expert, and the analytic score exact."""
    ffn, x = experts(gated=True), noise(20, D, seed=1)
    router = AnalyticRouter.of(ffn, E * M)
    router.init_from_experts_(ffn)
    torch.testing.assert_close(router(x), ffn.neurons(x).abs())


@pytest.mark.parametrize(("width", "count", "rank"), [(6, 4, 4), (6, 90, 6), (100, 90, 64)])
def test_low_rank_is_the_best_of_its_rank(width, count, rank):
    """Eckart-Young: of all matrices of this rank none is nearer to the expert centres."""
    ffn = FfnWeights(noise(count * M, width), noise(width, count * M, seed=1), nn.GELU())
    router = LowRankRouter(width, count)
    router.init_from_experts_(ffn)
    wanted = expert_centres(ffn, count)
    found = router(torch.eye(width)).T  # (E, d)
    assert torch.linalg.matrix_rank(found) == rank == len(router.proj_in)
    values = torch.linalg.svdvals(wanted)
    assert (found - wanted).norm().item() == pytest.approx(values[rank:].norm().item(), rel=1e-3, abs=1e-5)
    assert router.flops() == 2 * rank * (width + count)


SET = {  # other than the defaults
    "low_rank": {"rank": 2},
    "norm_regression": {"hidden": 5},
    "partial_input": {"inputs": 0.5},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_settings_change_what_a_router_costs(name):
    ffn = experts(gated=True)
    assert set(ROUTERS[name].settings) == set(SET.get(name, ()))
    usual, ours = (ROUTERS[name].of(ffn, E, **settings) for settings in ({}, SET.get(name, {})))
    for router in (usual, ours):
        router.read_from_(lambda: ffn, 0)
    costs = {
        "low_rank": 2 * 2 * (D + E),
        "norm_regression": 2 * 5 * (D + E),
        "partial_input": 2 * (D // 2) * 2 * E * M,
    }
    assert ours.flops() == costs.get(name, usual.flops())
    assert name not in SET or ours.flops() != usual.flops()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("low_rank", {"hidden": 3}, "LowRankRouter has no setting 'hidden': choose from rank"),
        ("linear", {"rank": 3}, "LinearRouter has no setting 'rank': it has none"),
        ("low_rank", {"rank": 0}, "rank of LowRankRouter must be a whole number from 1, got 0"),
        ("low_rank", {"rank": True}, "got True"),
        ("norm_regression", {"hidden": 2.5}, "whole number from 1, got 2.5"),
        ("partial_input", {"inputs": 1.5}, r"inputs of PartialInputRouter must be a share in \(0, 1\], got 1.5"),
        ("partial_input", {"inputs": "0.5"}, "got '0.5'"),
        ("partial_input", {"inputs": float("nan")}, "got nan"),
        (["linear"], {}, r"unknown router \['linear'\]; choose from linear"),
        ("low_rank", ["rank=3"], r"a mapping like {'rank': 64}, got \['rank=3'\]"),
    ],
)
def test_bad_settings_name_the_valid_ones(name, settings, message):
    with pytest.raises(ValueError, match=message):
        router_class(name, settings)


def test_norm_regression_is_the_papers_network():
    router, x = make("norm_regression"), noise(20, D)
    hidden = (x @ router.proj_in.T + router.bias_in).clamp_min(0)
    assert hidden.shape == (20, 128)
    torch.testing.assert_close(router(x), (hidden @ router.proj_out.T + router.bias_out).abs())


def test_relu_rmsnorm_does_not_depend_on_the_length_of_x():
    router, x = make("relu_rmsnorm"), noise(20, D)
    torch.testing.assert_close(router(x), router(7 * x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        router.gain.fill_(1)
    torch.testing.assert_close(router(x).square().mean(-1), torch.ones(20), rtol=1e-4, atol=0)


def test_prior_affinity_is_that_of_loops():
    neurons, down = noise(7, E, M), noise(D, E, M, seed=1)
    found = prior_affinity(neurons, down)
    assert found.shape == (7, E)
    for token, row in zip(neurons, found, strict=True):
        outputs = [down[:, e] @ token[e] for e in range(E)]
        errors = torch.stack([(output - sum(outputs)).square().mean() for output in outputs])
        torch.testing.assert_close(row, (-errors).softmax(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_weight_is_initialised(name):
    """`empty` tensors left as they are would be garbage, or whatever was in memory."""
    router = make(name)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in router.parameters():
            weight.fill_(float("nan"))
    router.reset_parameters()
    for weight in router.parameters():
        assert weight.isfinite().all() and weight.std() > 0.2 * weight.shape[-1] ** -0.5
    assert torch.equal(make(name)(noise(3, D)), make(name)(noise(3, D)))


@pytest.mark.parametrize("name", ROUTERS)
def test_reset_leaves_loaded_weights_alone(name):
    router = make(name)
    before = [weight.clone() for weight in router.parameters()]
    for weight in router.parameters():
        weight._is_hf_initialized = True  # what from_pretrained marks loaded tensors with
    router.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(router.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (0, D)])
def test_shapes(name, shape):
    scores = make(name)(noise(*shape))
    assert scores.shape == (*shape[:-1], E)


@pytest.mark.parametrize("name", ROUTERS)
def test_own_precision(name):
    """Neither the model's dtype nor autocast reaches a router: close scores must not be tied by rounding."""
    router, x = make(name), noise(5, D)
    scores = router(x)
    assert scores.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.Linear(D, E)(x).dtype == torch.bfloat16  # autocast is on
        assert torch.equal(router(x), scores)
    half = router(x.bfloat16())
    assert half.dtype == torch.float32 and torch.equal(half, router(x.bfloat16().float()))


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_are_bare_parameters(name):
    """A Linear inside would be quantised, or adapted by `target_modules="all-linear"`."""
    router = make(name)
    assert not list(router.children())
    assert all(type(weight) is nn.Parameter for weight in router.parameters())
    numbers = sum(weight.numel() for weight in router.parameters() if weight.dim() == 2)
    assert router.flops() == 2 * (2 * 2 * E * M if name == "partial_input" else numbers) > 0


@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if router.trainable])
def test_the_loss_teaches_the_targets(name):
    """Least where the scores order the experts as the targets do; the gradient reaches every weight."""
    router = make(name)
    targets = noise(20, E, seed=2).abs() + 0.1  # (T, E)
    scores = torch.zeros(20, E, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    first = router.loss(scores, targets)
    assert first.shape == ()
    for _ in range(300):
        optimizer.zero_grad()
        loss = router.loss(scores, targets)
        loss.backward()
        optimizer.step()
    assert loss < first
    assert torch.equal(scores.argsort(-1), targets.argsort(-1))
    router.loss(router(noise(20, D)), targets).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in router.parameters())


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_finite_where_nothing_fires(name, dtype):
    scores = noise(5, E).requires_grad_()
    loss = ROUTERS[name](D, E).loss(scores, torch.zeros(5, E, dtype=dtype))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


@pytest.mark.parametrize("name", ROUTERS)
def test_targets_have_one_number_per_expert(name):
    targets = ROUTERS[name].targets(noise(7, E, M), noise(D, E, M, seed=1))
    assert targets.shape == (7, E) and (targets >= 0).all()


SHAPES = [(7, 4, 3, 6), (1, 1, 1, 1), (3, 5, 1, 2), (2, 1, 8, 3)]  # T, E, m, d


@pytest.mark.parametrize(("tokens", "experts", "size", "width"), SHAPES)
def test_output_norm_is_the_norm_of_the_output(tokens, experts, size, width):
    neurons, down = noise(tokens, experts, size), noise(width, experts, size, seed=1)
    neurons[0, 0] = 0
    norms = output_norm(neurons, down)
    for t in range(tokens):
        for e in range(experts):
            assert norms[t, e].item() == pytest.approx((down[:, e] @ neurons[t, e]).norm().item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("tokens", "experts", "size", "width"), SHAPES)
def test_activation_mass_sums_what_is_positive(tokens, experts, size, width):
    neurons = noise(tokens, experts, size)
    mass = activation_mass(neurons, noise(width, experts, size, seed=1))
    for t in range(tokens):
        for e in range(experts):
            assert mass[t, e].item() == pytest.approx(sum(a for a in neurons[t, e].tolist() if a > 0), abs=1e-6)


def test_centres_are_means_of_directions():
    ffn = experts(gated=True)
    found = expert_centres(ffn, E)
    torch.testing.assert_close(found, centres(ffn))
    lengths = torch.rand(E * M, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    longer = FfnWeights(ffn.up, ffn.down, ffn.act, gate=ffn.gate * lengths)
    torch.testing.assert_close(expert_centres(longer, E), found)  # lengths do not matter
    half = FfnWeights(ffn.up, ffn.down, ffn.act, gate=ffn.gate.bfloat16())
    assert expert_centres(half, E).dtype == torch.float32


@pytest.mark.parametrize("model", ["bert", "llama"])
@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if not router.trainable])
def test_all_that_a_router_needs_is_saved(name, model, tmp_path):
    dense = tiny_model(model)
    convert(dense, 2, router=name, splitter="random")
    dense.save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path)
    x = noise(5, dense.moe_sites()[0].sizes[0])
    for site, again in zip(dense.moe_sites(), loaded.moe_sites(), strict=True):
        assert torch.equal(site.act.router(x), again.act.router(x))


@pytest.mark.parametrize("shared", [0, 3])
def test_partial_input_scores_the_experts_that_are_routed_to(shared):
    ffn, x = experts(gated=True), noise(20, D, seed=1)
    alone, beside = PartialInputRouter(D, E), PartialInputRouter(D, E - shared)
    alone.read_from_(lambda: ffn, 0)
    beside.read_from_(lambda: ffn, shared)
    assert torch.equal(beside(x), alone(x)[:, shared:])
    assert beside.flops() == alone.flops() * (E - shared) / E
    with pytest.raises(RuntimeError, match="read_from_"):
        PartialInputRouter(D, E)(x)


def test_partial_input_finds_the_largest_of_single_neurons():
    """Nearly as an oracle does where x has few large entries, and exactly where the others are zero."""
    ffn, x = experts(gated=True, bias=False), noise(200, D, seed=1)
    router = PartialInputRouter(D, E * M)
    router.read_from_(lambda: ffn, 0)
    x = x * torch.tensor([9.0, 1e-4, 1e-4, 1e-4, 9, 1e-4])
    exact = ffn.neurons(x).abs() * ffn.down.norm(dim=0)
    torch.testing.assert_close(router(x), exact, rtol=0.02, atol=0.02 * float(exact.max()))
    rounded = x * torch.tensor([1.0, 0, 0, 0, 1, 0])
    torch.testing.assert_close(router(rounded), ffn.neurons(rounded).abs() * ffn.down.norm(dim=0))


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "phi3"])
def test_partial_input_reads_the_weights_as_they_are_now(model):
    dense = tiny_model(model)
    convert(dense, 2, router="partial_input", splitter="random")
    copied = copy.deepcopy(dense)
    site, again = dense.moe_sites()[0], copied.moe_sites()[0]
    x = noise(20, site.sizes[0])
    before = site.act.router(x)
    with torch.no_grad():
        site.down.weight.data = 2 * site.down.weight  # another tensor, as moving a model makes them
    torch.testing.assert_close(site.act.router(x), 2 * before)
    assert torch.equal(again.act.router(x), before)  # a copy reads its own
    assert not list(site.act.router.parameters()) and not any("router" in key for key in dense.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_partial_input_reads_no_integers(dtype):
    ffn, router = experts(gated=True, bias=False), PartialInputRouter(D, E)
    ffn = FfnWeights(ffn.up.to(dtype), ffn.down.to(dtype), ffn.act, gate=ffn.gate.to(dtype))
    router.read_from_(lambda: ffn, 0)
    if dtype == torch.int8:
        with pytest.raises(RuntimeError, match="torch.int8"):
            router(noise(5, D))
    else:
        assert router(noise(5, D)).dtype == torch.float32


def test_partial_input_lets_no_gradient_through():
    ffn = experts(gated=True)
    ffn.up.requires_grad_()
    router = PartialInputRouter(D, E)
    router.read_from_(lambda: ffn, 0)
    assert not router(noise(5, D)).requires_grad
