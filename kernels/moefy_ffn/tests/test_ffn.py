"""The kernel against the masked computation in float64, over odd shapes."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from masked import REFERENCE, TOLERANCE, close, kept, low_rank, made, reference, scores_of
from moefy_ffn import ACTIVATIONS, build, moe_ffn


def check(inputs: dict, k: int, m: int, activation: str, shared: int = 0, **settings) -> None:
    """By the router: the experts are the best by its scores, and the output is theirs."""
    y, experts = moe_ffn(**inputs, k=k, expert_size=m, activation=activation, shared=shared, **settings)
    assert experts.shape == (len(y), k) and (experts.diff() > 0).all() and (experts >= 0).all()
    scores = scores_of(inputs["x"], inputs["router"], inputs.get("router_in"))
    best = torch.cat([torch.full((len(y), shared), torch.inf), scores], -1)
    worst_kept = best.gather(-1, experts.long()).amin(-1)
    keep = kept(experts, best.shape[-1])
    rounding = 1e-2 if inputs["router"].dtype == torch.bfloat16 and "router_in" in inputs else 1e-5  # ties between
    assert (best.masked_fill(keep, -torch.inf).amax(-1) <= worst_kept + rounding).all()
    close(y, reference(**inputs, keep=keep, activation=activation, means=settings.get("means")))


@pytest.mark.parametrize(("gated", "biased"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_form_of_ffn(dtype, activation, gated, biased):
    for tokens in (1, 7):
        check(made(tokens, 40, 6, 8, gated, biased, dtype=dtype), 2, 8, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation):
    """One neuron, one input: the activation itself, to float32 precision."""
    sizes = torch.logspace(-30, 38, 137)
    x = torch.cat([torch.linspace(-100, 100, 4001), sizes, -sizes]).unsqueeze(-1)
    one = torch.ones(1, 1)
    y, _ = moe_ffn(
        x, one, one, experts=torch.zeros(len(x), 1, dtype=torch.int32), expert_size=1, activation=activation
    )
    torch.testing.assert_close(y, REFERENCE[activation](x.double()).float(), rtol=2e-6, atol=4e-7)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 13, 129, 2048])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_numbers_of_tokens_and_threads(dtype, tokens, threads):
    check(made(tokens, 72, 24, 4, gated=True, biased=True, dtype=dtype), 5, 4, "silu", threads=threads)


@pytest.mark.parametrize("d", [1, 7, 16, 65, 300])
@pytest.mark.parametrize("m", [1, 4, 8, 13, 128, 512])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_widths_that_are_no_multiples_of_a_vector(dtype, d, m):
    for tokens in (1, 5):
        check(made(tokens, d, 4, m, gated=False, biased=True, dtype=dtype), 2, m, "gelu")


@pytest.mark.parametrize("shared", [0, 1, 3])
@pytest.mark.parametrize("k", [3, 11, 12])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_budgets_and_shared_experts(dtype, k, shared):
    for tokens in (1, 50):
        inputs = made(tokens, 32, 12, 4, gated=False, biased=False, dtype=dtype)
        inputs["router"] = inputs["router"][shared:].contiguous()
        check(inputs, k, 4, "relu", shared=shared)


def test_a_float32_router_of_a_bfloat16_ffn():
    for tokens in (1, 600):  # so many that some of them choose others by the rounded router
        inputs = made(tokens, 40, 12, 4, gated=True, biased=True, dtype=torch.bfloat16)
        check(inputs | {"router": made(1, 40, 12, 4, False, False, seed=1)["router"]}, 3, 4, "silu")


@pytest.mark.parametrize("rank", [1, 5, 16, 70])
@pytest.mark.parametrize(
    ("dtype", "router_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_a_low_rank_router(dtype, router_dtype, rank):
    for tokens, threads in ((1, 1), (1, 2), (9, 2), (300, 3)):
        inputs = made(tokens, 72, 24, 4, gated=True, biased=True, dtype=dtype)
        matrices = low_rank(inputs["router"][2:].to(router_dtype), rank)
        check(inputs | matrices, 7, 4, "silu", shared=2, threads=threads)


def test_a_low_rank_router_rounds_between_its_matrices_as_torch_does():
    """To bfloat16, to the nearest, ties to even: then two experts have equal scores, and the first of them runs."""
    x = torch.tensor(
        [[1, 3 * 2**-8, 2**-6], [1, 0, 2**-8]]
    ).bfloat16()  # sums 1 + 3/256 and 1 + 4/256; 1 and 1 + 1/256
    router_in, router = torch.tensor([[1.0, 1, 0], [1, 0, 1]]).bfloat16(), torch.eye(2).bfloat16()
    scores = F.linear(F.linear(x, router_in), router)
    assert scores.tolist() == [[1 + 2**-6, 1 + 2**-6], [1, 1]]
    neurons = torch.ones(2, 3).bfloat16()
    given = {"k": 1, "expert_size": 1, "activation": "relu", "router": router, "router_in": router_in}
    for tokens in (x, x.repeat(20, 1)):
        assert not moe_ffn(tokens, neurons, neurons, **given)[1].any()


@pytest.mark.parametrize("tokens", [1, 2, 7, 13, 40])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_zeros_of_some_tokens(dtype, tokens):
    """A quarter of the tokens has the same neurons, in pairs, and all others zero: groups of tokens sum other rows."""
    own = torch.arange(tokens) * 4 // tokens  # (T,)
    x = F.one_hot(own, 4).to(dtype)
    up = 1 + 0.25 * (torch.arange(40) % 3)  # of one expert
    up = F.one_hot(torch.arange(40) // 2 % 4, 4).to(dtype) * up.unsqueeze(-1).to(dtype)
    down = torch.randn(40, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    up, x = (F.pad(each, (0, 188)) for each in (up, x))
    experts = torch.zeros(tokens, 1, dtype=torch.int32)
    y, _ = moe_ffn(x, up, down, experts=experts, expert_size=40, activation="relu")
    close(y, (x.double() @ up.double().T).relu() @ down.double())


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_of_zero_neurons_are_not_read(dtype, tokens):
    x, up, down = torch.ones(tokens, 64), torch.zeros(16, 64), torch.ones(16, 64)
    up[::3], down[1::3], down[2::3] = 1 / 64, torch.inf, torch.nan  # those of `up` that are zero
    given = {"experts": torch.zeros(tokens, 1, dtype=torch.int32), "expert_size": 16, "activation": "relu"}
    y, _ = moe_ffn(x.to(dtype), up.to(dtype), down.to(dtype), **given)
    assert (y == 6).all()


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 70, 300])
def test_unused_slots_and_means(tokens, dtype, compensated):
    """Each token has its own number of experts, one has none; in any order."""
    inputs = made(tokens, 40, 12, 8, gated=True, biased=True, dtype=dtype)
    del inputs["router"]
    generator = torch.Generator().manual_seed(1)
    experts = torch.stack([torch.randperm(12, generator=generator) for _ in range(tokens)]).int()
    experts = experts.where(torch.rand(tokens, 12, generator=generator) < 0.3, -1)
    experts[0] = -1
    means = torch.randn(12, 40, generator=generator).to(dtype) if compensated else None
    y, same = moe_ffn(**inputs, expert_size=8, activation="silu", experts=experts, means=means)
    assert same is experts
    close(y, reference(**inputs, router=None, keep=kept(experts, 12), activation="silu", means=means))
    if not compensated:
        assert torch.equal(y[0], inputs["down_bias"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", [8, 100])
def test_means_with_a_router(m, dtype):
    for tokens in (1, 50):
        inputs = made(tokens, 40, 12, m, gated=False, biased=True, dtype=dtype)
        check(inputs, 5, m, "relu", means=torch.randn(12, 40).to(dtype))


def test_bfloat16_outputs_are_rounded_to_the_nearest():
    """One neuron: a product of two bfloat16 numbers, which float32 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    x, down = torch.zeros(50, 70).bfloat16(), torch.randn(1, 70, generator=generator).bfloat16()
    x[:, 0] = torch.rand(50, generator=generator)
    given = torch.zeros(50, 1, dtype=torch.int32)
    y, _ = moe_ffn(x, torch.ones_like(down), down, expert_size=1, activation="relu", experts=given)
    assert torch.equal(y, (x[:, :1].float() * down.float()).bfloat16())


def test_equal_and_nan_scores():
    """Of equal scores the first experts run, and nan counts as the best."""
    inputs = made(2, 32, 6, 4, gated=False, biased=False)
    inputs["router"] = torch.zeros(6, 32)
    assert moe_ffn(**inputs, k=4, expert_size=4, activation="relu")[1].tolist() == [[0, 1, 2, 3]] * 2
    inputs["router"][4] = float("nan")
    assert moe_ffn(**inputs, k=2, expert_size=4, activation="relu")[1].tolist() == [[0, 4]] * 2


def test_all_tokens_on_one_expert_and_given_experts():
    inputs = made(33, 32, 12, 4, gated=True, biased=False)
    by_router, experts = moe_ffn(**inputs, k=3, expert_size=4, activation="silu")
    router = inputs.pop("router")
    y, same = moe_ffn(**inputs, k=3, expert_size=4, activation="silu", experts=experts)
    assert torch.equal(y, by_router) and same is experts
    one = torch.full((33, 1), 5, dtype=torch.int32)
    y, _ = moe_ffn(**inputs, k=1, expert_size=4, activation="silu", experts=one)
    inputs["router"] = torch.zeros_like(router)
    inputs["x"][:, 0], inputs["router"][5, 0] = 1, 1
    check(inputs, 1, 4, "silu")
    torch.testing.assert_close(
        moe_ffn(**inputs, k=1, expert_size=4, activation="silu")[0],
        moe_ffn(**{**inputs, "router": None}, k=1, expert_size=4, activation="silu", experts=one)[0],
    )
    assert y.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nan_and_inf_as_in_the_masked_ffn(dtype, activation, tokens):
    for value in (float("nan"), float("inf"), -float("inf")):
        inputs = made(tokens, 32, 6, 4, gated=False, biased=False, dtype=dtype)
        inputs["x"][0, 3] = value
        experts = torch.tensor([[1, 4]] * tokens, dtype=torch.int32)
        router = inputs.pop("router")
        y, _ = moe_ffn(**inputs, expert_size=4, activation=activation, experts=experts)
        expected = reference(**inputs, router=router, keep=kept(experts, 6), activation=activation)
        assert torch.equal(y[0].isfinite(), expected[0].isfinite()) and y[1:].isfinite().all()


def test_shapes_layouts_and_no_tokens():
    inputs = made(6, 32, 6, 4, gated=False, biased=False)
    flat, _ = moe_ffn(**inputs, k=2, expert_size=4, activation="relu")
    x = inputs.pop("x")
    y, experts = moe_ffn(x.view(2, 3, 32), **inputs, k=2, expert_size=4, activation="relu")
    assert torch.equal(y.view(6, 32), flat) and experts.shape == (2, 3, 2)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(moe_ffn(strided, **inputs, k=2, expert_size=4, activation="relu")[0], flat)
    assert moe_ffn(x[:0], **inputs, k=2, expert_size=4, activation="relu")[0].shape == (0, 32)


def test_the_same_bits_for_any_number_of_threads():
    inputs = made(40, 100, 12, 4, gated=True, biased=True)
    one, two = (moe_ffn(**inputs, k=5, expert_size=4, activation="silu", threads=n)[0] for n in (1, 3))
    assert torch.equal(one, two)


def test_threads_may_call_at_once():
    inputs = [made(17, 64, 12, 4, gated=True, biased=True, seed=seed) for seed in range(4)]
    expected = [moe_ffn(**each, k=5, expert_size=4, activation="silu")[0] for each in inputs]
    wrong = []

    def call(number: int) -> None:
        for _ in range(50):
            if not torch.equal(moe_ffn(**inputs[number], k=5, expert_size=4, activation="silu")[0], expected[number]):
                wrong.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))  # raises what they raise
    assert not wrong


BAD = [
    ({"activation": "tanh"}, "unknown activation 'tanh'; choose from relu, gelu"),
    ({"k": 7}, "k=7 of experts of 4 neurons does not fit 24"),
    ({"expert_size": 5}, "experts of 5 neurons"),
    ({"shared": 3}, "does not fit 24 neurons and 3 shared experts"),
    ({"k": None}, "k=None"),
    ({"up": torch.zeros(24, 32).double()}, "up must be torch.float32 or torch.bfloat16, got torch.float64"),
    ({"down": torch.zeros(24, 32).bfloat16()}, "down must be a contiguous torch.float32 .* got a torch.bfloat16"),
    ({"router_in": torch.zeros(5, 32)}, r"router_in must be .* of shape \(32, 32\)"),
    ({"router_in": torch.zeros(0, 32), "router": torch.zeros(6, 0)}, r"router must have columns, got shape \(6, 0\)"),
    ({"router_in": torch.zeros(5, 32), "router": torch.zeros(())}, r"router must have columns, got shape \(\)"),
    ({"router_in": torch.tensor(0.0), "router": torch.zeros(6, 5)}, r"router_in must be .* of shape \(5, 32\)"),
    ({"shared": 6, "k": 6, "router": torch.zeros(0, 32)}, "does not fit 24 neurons and 6 shared experts"),
    ({"router_in": torch.zeros(5, 32).bfloat16(), "router": torch.zeros(6, 5)}, "router_in must be a .*torch.float32"),
    ({"router_in": torch.zeros(5, 32), "router": None, "k": None}, "router_in is nothing without a router"),
    ({"router": torch.zeros(6, 32).bfloat16()}, "router must be a contiguous torch.float32"),
    ({"means": torch.zeros(5, 32)}, r"means must be .* shape \(6, 32\)"),
    ({"x": torch.zeros(2, 32).bfloat16()}, "x must be a contiguous torch.float32"),
    (
        {"router": None, "experts": torch.tensor([[0, 6]] * 2, dtype=torch.int32)},
        r"experts must lie in \[-1, 6\), got 0",
    ),
    ({"router": None, "experts": torch.tensor([[0, -2]] * 2, dtype=torch.int32)}, r"got -2 to 0"),
    ({"down": torch.zeros(32, 24).t()}, "down must be .* got a not contiguous"),
    ({"router": torch.zeros(5, 32)}, r"router must be .* shape \(6, 32\)"),
    ({"router": None}, "give a router or experts"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes, message):
    given = {**made(2, 32, 6, 4, False, False), "k": 2, "expert_size": 4, "activation": "relu", **changes}
    with pytest.raises(ValueError, match=message):
        moe_ffn(**given)


def test_compiled_once_and_without_a_compiler_a_clear_error(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MOEFY_KERNELS", str(tmp_path))
    build.library.cache_clear()
    try:
        build.library()
        (made_file,) = tmp_path.iterdir()
        assert "compiling ffn.cpp" in capfd.readouterr().err
        build.library.cache_clear()
        build.library()
        assert capfd.readouterr().err == "" and list(tmp_path.iterdir()) == [made_file]
        build.library.cache_clear()
        monkeypatch.setenv("CXX", "/bin/false")  # another compiler, another key
        with pytest.raises(build.BuildError, match="/bin/false failed"):
            build.library()
        assert list(tmp_path.iterdir()) == [made_file]
        monkeypatch.delenv("CXX")
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
        with pytest.raises(build.BuildError, match="no C.. compiler"):
            build.library()
    finally:
        build.library.cache_clear()
