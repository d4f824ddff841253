"""The kernel on FFNs that hypothesis draws, against the masked computation in float64.

The same examples on every run; HYPOTHESIS_SEARCH=1 looks for new ones, longer.
"""

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moefy_ffn import ACTIVATIONS, moe_ffn
from test_ffn import made, reference

LAYOUTS = {  # of x (tokens, d) -> the same numbers, laid out otherwise
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
    "rows of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], -1)[:, : x.shape[1]],
    "one row for all": lambda x: x[:1].expand(x.shape),
}
SEARCH = bool(os.environ.get("HYPOTHESIS_SEARCH"))


@st.composite
def cases(draw: st.DrawFn) -> dict:
    experts, m = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    return {
        "tokens": draw(st.one_of(st.integers(1, 12), st.sampled_from([31, 255, 256, 257, 300]))),
        "d": draw(st.integers(1, 130)),
        "experts": experts,
        "m": m,
        "k": draw(st.integers(1, experts)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "gated": draw(st.booleans()),
        "biases": draw(st.sets(st.sampled_from(["up_bias", "gate_bias", "down_bias"]))),
        "layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(deadline=None, derandomize=not SEARCH, max_examples=20_000 if SEARCH else 300, database=None)
@given(cases())
def test_any_ffn_is_the_masked_one(case: dict):
    inputs = made(case["tokens"], case["d"], case["experts"], case["m"], case["gated"], True, case["seed"])
    inputs |= {name: None for name in ("up_bias", "gate_bias", "down_bias") if name not in case["biases"]}
    inputs["x"] = LAYOUTS[case["layout"]](inputs["x"])
    k, m, activation = case["k"], case["m"], case["activation"]
    certain = decided(inputs["x"], inputs["router"], k)
    expected = reference(**inputs, k=k, m=m, activation=activation)[certain]
    y, experts = moe_ffn(**inputs, k=k, expert_size=m, activation=activation, threads=case["threads"])
    scale = float(expected.abs().max()) if certain.any() else 1.0
    torch.testing.assert_close(y[certain].double(), expected, rtol=1e-5, atol=1e-5 * max(scale, 1e-30))
    assert experts.shape == (case["tokens"], k) and ((0 <= experts) & (experts < case["experts"])).all()
    assert (experts.diff() > 0).all()  # each once, in their order


def decided(x: torch.Tensor, router: torch.Tensor, k: int) -> torch.Tensor:
    """(T,) bool: tokens whose k-th and next score are further apart than float32 rounds."""
    scores = (x.double() @ router.double().T).sort(-1, descending=True).values
    if k == scores.shape[1]:
        return torch.ones(len(x), dtype=torch.bool)
    size = x.double().norm(dim=-1) * router.double().norm(dim=-1).max()
    return scores[:, k - 1] - scores[:, k] > 1e-6 * size
