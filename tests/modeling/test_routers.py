"""Routers score what they say, start from their experts, learn their targets, and keep their own precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moefy_hf.modeling.routers import ROUTERS, activation_mass, expert_centres, output_norm, prior_affinity

D, E, M = 6, 4, 3


def cosines(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cosine_similarity(x, centre, dim=-1) for centre in centres], -1)


# (x, keys (E, m, d)) -> what a router that was initialised from its experts must compute, up to a positive factor
SCORES = {
    "linear": lambda x, keys: torch.stack([(x @ (k / k.norm(dim=1, keepdim=True)).mean(0)) for k in keys], -1),
    "mlp": lambda x, keys: torch.stack(
        [(x / x.norm(dim=-1, keepdim=True) @ (k / k.norm(dim=1, keepdim=True)).mean(0)).tanh() for k in keys], -1
    ),
    "prior_approximate": lambda x, keys: SCORES["linear"](x, keys),
    "similarity": lambda x, keys: cosines(x, torch.stack([(k / k.norm(dim=1, keepdim=True)).mean(0) for k in keys])),
    "random": None,  # nothing about the experts
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    router = ROUTERS[name](D, E)
    router.reset_parameters()
    return router


def test_every_router_is_tested():
    assert set(ROUTERS) == set(SCORES)


@pytest.mark.parametrize("name", ROUTERS)
def test_initialised_from_the_experts(name):
    router, keys, x = make(name), noise(E, M, D), noise(50, D, seed=1)
    before = [weight.clone() for weight in router.parameters()]
    router.init_from_experts_(keys)
    scores = router(x)
    if SCORES[name] is None:
        assert all(torch.equal(a, b) for a, b in zip(router.parameters(), before, strict=True))
        return
    expected = SCORES[name](x, keys)
    torch.testing.assert_close(F.normalize(scores, dim=-1), F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.argsort(-1), expected.argsort(-1))


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
    torch.manual_seed(0)
    router = ROUTERS[name](D, E)
    with torch.no_grad():
        for weight in router.parameters():
            weight.fill_(float("nan"))
    router.reset_parameters()
    for weight in router.parameters():
        assert weight.isfinite().all() and weight.std() > 0.1
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
    assert router.flops() == 2 * sum(weight.numel() for weight in router.parameters()) > 0


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
    keys = noise(E, M, D)
    centres = expert_centres(keys)
    for e in range(E):
        assert torch.allclose(centres[e], sum(key / key.norm() for key in keys[e]) / M, atol=1e-6)
    torch.testing.assert_close(expert_centres(keys * torch.rand(E, M, 1).add(0.1)), centres)  # lengths do not matter
    assert expert_centres(keys.bfloat16()).dtype == torch.float32
