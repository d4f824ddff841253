"""The Triton kernels, on a GPU or interpreted, against the masked computation in float64; gradients too."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from moefy_ffn import triton_ffn  # noqa: E402
from moefy_ffn.triton_ffn import ACTIVATIONS, FEW_TOKENS, triton_moe_ffn  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="interpreted only without a GPU")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest number
FEW, MANY = 7, 29
assert FEW <= FEW_TOKENS < MANY


def made(device: str, tokens: int, d: int, num: int, m: int, k: int, *, gated=True, biased=True, unused=0.0) -> dict:
    """Inputs of `triton_moe_ffn`; weights as a model keeps them: `down` is the transpose of nn.Linear's."""
    generator = torch.Generator().manual_seed(tokens + d)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device)

    f = num * m
    found = {"x": noise(tokens, d) * d**0.5, "up": noise(f, d), "down": (noise(d, f) * m).t()}
    found |= {"gate": noise(f, d) if gated else None, "up_bias": noise(f) if biased else None}
    found |= {"gate_bias": noise(f) if gated and biased else None, "down_bias": noise(d) if biased else None}
    experts = torch.rand(tokens, num, generator=generator).topk(k).indices.int()
    experts[torch.rand(tokens, k, generator=generator) < unused] = -1
    return found | {"experts": experts.to(device)}


def reference(x, up, down, experts, gate, up_bias, gate_bias, down_bias, *, expert_size, activation) -> torch.Tensor:
    """Dense, then masked."""
    keep = torch.zeros(len(x), len(up) // expert_size + 1, dtype=torch.bool, device=x.device)
    keep = keep.scatter(-1, experts.long() % keep.shape[1], True)[:, :-1].repeat_interleave(expert_size, -1)
    act, hidden = ACTIVATIONS[activation], F.linear(x, up, up_bias)
    hidden = act(hidden) if gate is None else act(F.linear(x, gate, gate_bias)) * hidden
    y = hidden.masked_fill(~keep, 0) @ down
    return y if down_bias is None else y + down_bias


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    atol = TOLERANCES[dtype] * max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def check(inputs: dict, m: int, activation: str = "silu", dtype=torch.float32, gradients: bool = False) -> dict:
    """Outputs, and gradients if wanted, agree with float64's on the same numbers; returns the gradients."""

    def leaves(to: torch.dtype) -> dict:
        given = {name: t.to(dtype).to(to) if t is not None and name != "experts" else t for name, t in inputs.items()}
        wanted = (name for name in given if gradients and given[name] is not None and name != "experts")
        return given | {name: given[name].detach().requires_grad_() for name in wanted}

    ours, theirs = leaves(dtype), leaves(torch.float64)
    y = triton_moe_ffn(**ours, expert_size=m, activation=activation)
    expected = reference(**theirs, expert_size=m, activation=activation)
    close(y, expected, dtype)
    if not gradients:
        return {}
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    y.backward(direction.to(dtype))
    expected.backward(direction.to(dtype).double())
    for name in ours:
        if name != "experts" and ours[name] is not None:
            close(ours[name].grad, theirs[name].grad, dtype)
    return {name: ours[name].grad for name in ours if name != "experts" and ours[name] is not None}


@on_each_device
@pytest.mark.parametrize(("gated", "biased"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_form_of_ffn(device, activation, gated, biased):
    for tokens in (FEW, MANY):
        check(made(device, tokens, 24, 4, 8, 2, gated=gated, biased=biased), 8, activation)
    check(made(device, FEW, 24, 4, 8, 2, gated=gated, biased=biased), 8, activation, gradients=True)


@on_each_device
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tokens", [1, FEW, 129])
def test_numbers_of_tokens_and_dtypes(device, tokens, dtype):
    inputs = made(device, tokens, 40, 6, 8, 3, unused=0.3)
    check(inputs, 8, dtype=dtype)
    check(inputs, 8, dtype=dtype, gradients=True)


@on_each_device
@pytest.mark.parametrize("d", [1, 67])
@pytest.mark.parametrize("m", [4, 8, 32, 100, 512])
def test_widths_that_are_no_multiples_of_a_block(device, m, d):
    for tokens, gradients in ((2, False), (9, False), (3, True)):
        check(made(device, tokens, d, 2, m, 1), m, gradients=gradients)


@on_each_device
@pytest.mark.parametrize("k", [1, 6])
def test_budgets(device, k):
    for tokens, gradients in ((FEW, False), (MANY, False), (MANY, True)):
        check(made(device, tokens, 16, 6, 4, k), 4, gradients=gradients)


@on_each_device
@pytest.mark.parametrize("tokens", [FEW, 150])
def test_all_tokens_on_one_expert(device, tokens):
    """Several blocks of one expert; the others' gradients are exactly zero."""
    inputs = made(device, tokens, 16, 6, 4, 1)
    inputs["experts"][:] = 2
    check(inputs, 4)
    grads = check(inputs, 4, gradients=True)
    for name in ("up", "gate", "down", "up_bias", "gate_bias"):
        by_expert = grads[name].unflatten(0, (6, 4)).abs().flatten(1).sum(1)
        assert (by_expert > 0).tolist() == [e == 2 for e in range(6)]


@on_each_device
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_token_without_experts(device, tokens):
    inputs = made(device, tokens, 16, 6, 4, 3)
    inputs["experts"][1] = -1
    y = triton_moe_ffn(**inputs, expert_size=4, activation="silu")
    assert torch.equal(y[1], inputs["down_bias"])
    inputs["experts"][:] = -1
    assert all((grad == 0).all() for name, grad in check(inputs, 4, gradients=True).items() if name != "down_bias")


@on_each_device
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_nan_and_inf_reach_only_the_tokens_that_see_them(device, tokens, bad):
    inputs = made(device, tokens, 16, 6, 4, 2, gated=False)
    inputs["x"][0, 5] = bad  # of the token that masked places point to
    inputs["up"][4 * 1 + 2, 3] = bad  # a neuron of expert 1
    inputs["down"][4 * 5 + 1, 7] = bad  # and of expert 5, in one column
    chosen = inputs["experts"]
    for name in ("x", "up", "down"):
        inputs[name].requires_grad_()
    y = triton_moe_ffn(**inputs, expert_size=4, activation="gelu")
    with torch.no_grad():
        assert torch.equal(triton_moe_ffn(**inputs, expert_size=4, activation="gelu").isfinite(), y.isfinite())
    sees = (chosen == 1).any(1)
    sees[0] = True
    assert (y.isfinite().all(1) == ~(sees | (chosen == 5).any(1))).all() and sees.any() and not sees.all()
    column = torch.arange(16, device=device) != 7
    assert (y[:, column].isfinite().all(1) == ~sees).all()
    y[~sees].sum().backward()  # gradients of experts that no bad number touched are finite
    clean = [e for e in range(6) if e not in (1, 5, *chosen[0].tolist())]
    assert clean and all(inputs["up"].grad.unflatten(0, (6, 4))[e].isfinite().all() for e in clean)


@on_each_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(device, activation):
    for tokens in (FEW, MANY):
        inputs = made(device, tokens, 16, 6, 4, 2, gated=False)
        inputs["x"][3, 5] = float("nan")
        y = triton_moe_ffn(**inputs, expert_size=4, activation=activation)
        assert y[3].isnan().all() and y.isfinite().all(1).sum() == tokens - 1


@on_each_device
def test_shapes_layouts_and_no_tokens(device):
    inputs = made(device, 12, 24, 6, 4, 2)
    y = triton_moe_ffn(**inputs, expert_size=4, activation="silu")
    x, experts, rest = inputs.pop("x"), inputs.pop("experts"), inputs
    for layout in (torch.stack([x, x], -1)[..., 0], x.t().contiguous().t()):
        assert not layout.is_contiguous()
        assert torch.equal(triton_moe_ffn(layout, experts=experts, **rest, expert_size=4, activation="silu"), y)
    split = {"x": x.view(3, 4, 24), "experts": experts.view(3, 4, 2)}
    assert torch.equal(triton_moe_ffn(**split, **rest, expert_size=4, activation="silu"), y.view(3, 4, 24))
    for tokens, wanted in itertools.product((0, 12), (False, True)):  # rows of down as the other implementations keep
        given = {**rest, "x": x[:tokens], "down": rest["down"].contiguous().requires_grad_(wanted)}
        found = triton_moe_ffn(**given, experts=experts[:tokens], expert_size=4, activation="silu")
        close(found, y[:tokens], torch.float32) if tokens else None
        assert found.shape == (tokens, 24)
        if wanted:
            found.sum().backward()
            assert (given["down"].grad.abs().sum() > 0) == (tokens > 0)


@on_each_device
def test_columns_in_turns_and_the_same_bits_on_every_run(device, monkeypatch):
    for tokens, d in ((FEW, 270), (MANY, 140)):
        inputs = made(device, tokens, d, 3, 4, 2)
        y = triton_moe_ffn(**inputs, expert_size=4, activation="silu")
        monkeypatch.setattr(triton_ffn, "LARGEST_ROWS", 1)  # 128 columns at once
        assert torch.equal(triton_moe_ffn(**inputs, expert_size=4, activation="silu"), y)
        check(inputs, 4, gradients=tokens == MANY)
        monkeypatch.undo()


@on_each_device
def test_only_what_is_wanted_gets_a_gradient(device):
    inputs = made(device, FEW, 16, 6, 4, 2)
    grads = check(inputs, 4, gradients=True)
    for name in ("x", "gate", "down", "up_bias"):
        given = {**inputs, name: inputs[name].detach().requires_grad_()}
        assert triton_moe_ffn(**inputs, expert_size=4, activation="silu").grad_fn is None
        y = triton_moe_ffn(**given, expert_size=4, activation="silu")
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
        y.backward(direction)
        assert torch.equal(given[name].grad, grads[name])


BAD = [
    ({"activation": "tanh"}, "unknown activation 'tanh'; choose from relu, gelu"),
    ({"expert_size": 5}, "experts of 5 neurons do not fit 24 neurons"),
    ({"up": torch.zeros(24, 16).double()}, "up must be a torch.float32 tensor .* got torch.float64"),
    ({"x": torch.zeros(2, 16).double()}, "x is torch.float64; choose from torch.float32, torch.bfloat16"),
    ({"x": torch.zeros(2, 15)}, r"x must be .* shape \(2, 16\)"),
    ({"down": torch.zeros(16, 24)}, r"down must be .* shape \(24, 16\)"),
    ({"experts": torch.zeros(2, 2)}, "experts must be a torch.int32"),
    ({"experts": torch.zeros(3, 2).int()}, r"experts must be .* shape \(2, 2\)"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        triton_moe_ffn(**{**made("cpu", 2, 16, 6, 4, 2), "expert_size": 4, "activation": "relu", **changes})


def test_kernels_compile_for_gpus(tmp_path):
    """For one that need not be here: the interpreter takes more than the compiler does."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script, "90"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 20, done.stderr
