"""The kernel against the masked computation in float64, over odd shapes."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from moefy_ffn import ACTIVATIONS, build, moe_ffn

REFERENCE = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def made(tokens: int, d: int, experts: int, m: int, gated: bool, biased: bool, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    f = experts * m
    found = {"x": noise(tokens, d) * d**0.5, "up": noise(f, d), "down": noise(f, d), "router": noise(experts, d)}
    found |= {"gate": noise(f, d) if gated else None}
    biases = {"up_bias": (f,), "gate_bias": (f,), "down_bias": (d,)}
    return found | {
        name: noise(*shape) if biased and (gated or name != "gate_bias") else None for name, shape in biases.items()
    }


def reference(x, up, down, router, gate, up_bias, gate_bias, down_bias, k, m, activation) -> torch.Tensor:
    """Dense, then masked, in float64."""
    x, up, down, router, gate, up_bias, gate_bias, down_bias = (
        None if t is None else t.double() for t in (x, up, down, router, gate, up_bias, gate_bias, down_bias)
    )
    keep = torch.zeros(len(x), len(router), dtype=torch.bool).scatter(-1, (x @ router.T).topk(k, -1).indices, True)
    act = REFERENCE[activation]
    hidden = F.linear(x, up, up_bias)
    hidden = act(hidden) if gate is None else act(F.linear(x, gate, gate_bias)) * hidden
    y = hidden.masked_fill(~keep.repeat_interleave(m, -1), 0) @ down
    return y if down_bias is None else y + down_bias


def check(inputs: dict, k: int, m: int, activation: str, **settings) -> None:
    expected = reference(**inputs, k=k, m=m, activation=activation)
    y, experts = moe_ffn(**inputs, k=k, expert_size=m, activation=activation, **settings)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * max(float(expected.abs().max()), 1e-30))
    assert experts.shape == (len(y), k) and (experts.diff() > 0).all()


@pytest.mark.parametrize(("gated", "biased"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_form_of_ffn(activation, gated, biased):
    for tokens in (1, 7):
        check(made(tokens, 40, 6, 8, gated, biased), 2, 8, activation)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 129, 600])
def test_numbers_of_tokens_and_threads(tokens, threads):
    check(made(tokens, 72, 24, 4, gated=True, biased=True), 5, 4, "silu", threads=threads)


@pytest.mark.parametrize("d", [1, 7, 16, 65, 300])
@pytest.mark.parametrize("m", [1, 4, 13, 512])
def test_widths_that_are_no_multiples_of_a_vector(d, m):
    for tokens in (1, 5):
        check(made(tokens, d, 4, m, gated=False, biased=True), 2, m, "gelu")


@pytest.mark.parametrize("k", [1, 11, 12])
def test_budgets(k):
    for tokens in (1, 50):
        check(made(tokens, 32, 12, 4, gated=False, biased=False), k, 4, "relu")


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


def test_nan_and_inf_pass_through():
    inputs = made(9, 32, 6, 4, gated=False, biased=False)
    inputs["x"][2, 3], inputs["x"][4, 1] = float("nan"), float("inf")
    y, _ = moe_ffn(**inputs, k=2, expert_size=4, activation="relu")
    finite = y.isfinite().all(-1)
    assert finite.tolist() == [i not in (2, 4) for i in range(9)] and y[2].isnan().all()


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
    ({"up": torch.zeros(24, 32).double()}, "up must be a contiguous torch.float32"),
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
