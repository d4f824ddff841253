"""The kernel on FFNs that hypothesis draws, against the masked computation in float64.

The same examples on every run; HYPOTHESIS_SEARCH=1 looks for new ones, longer.
"""

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import TOLERANCE, kept, low_rank, made, reference, scores_of
from moefy_ffn import ACTIVATIONS, STRENGTHS, moe_ffn
from test_selections import check_choice

LAYOUTS = {  # of x (tokens, d) -> the same numbers, laid out otherwise
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
    "rows of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], -1)[:, : x.shape[1]],
    "one row for all": lambda x: x[:1].expand(x.shape),
}
SETTINGS = {
    "threshold": st.floats(0, 1, width=32),
    "top_p": st.floats(0, 1, width=32),
    "level": st.floats(-1, 8, width=32),
}
SEARCH = bool(os.environ.get("HYPOTHESIS_SEARCH"))


@st.composite
def cases(draw: st.DrawFn) -> dict:
    experts = draw(st.integers(1, 20))
    shared = draw(st.integers(0, min(3, experts - 1)))
    selection = draw(st.sampled_from(["given", "top_k", *SETTINGS]))
    return {
        "selection": selection,
        "setting": draw(SETTINGS.get(selection, st.none())),
        "strengths": draw(st.sampled_from(STRENGTHS)),
        "tokens": draw(st.one_of(st.integers(1, 12), st.sampled_from([31, 255, 256, 257, 300]))),
        "d": draw(st.integers(1, 130)),
        "experts": experts,
        "m": draw(st.integers(1, 40)),
        "shared": shared,
        "rank": draw(st.one_of(st.none(), st.integers(1, 40))),  # of a float32 router
        "k": draw(st.integers(max(1, shared), experts)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "gated": draw(st.booleans()),
        "biases": draw(st.sets(st.sampled_from(["up_bias", "gate_bias", "down_bias"]))),
        "means": draw(st.booleans()),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(deadline=None, derandomize=not SEARCH, max_examples=20_000 if SEARCH else 300, database=None)
@given(cases())
def test_any_ffn_is_the_masked_one(case: dict):
    tokens, d, experts, m, seed = (case[name] for name in ("tokens", "d", "experts", "m", "seed"))
    inputs = made(tokens, d, experts, m, case["gated"], True, seed, case["dtype"])
    inputs |= {name: None for name in ("up_bias", "gate_bias", "down_bias") if name not in case["biases"]}
    inputs["x"] = LAYOUTS[case["layout"]](inputs["x"])
    matrices = {"router": inputs.pop("router")[case["shared"] :].contiguous()}
    if case["rank"] is not None:
        matrices = low_rank(matrices["router"].float(), case["rank"], seed)
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(experts, d, generator=generator).to(case["dtype"]) if case["means"] else None
    called = inputs | {"activation": case["activation"], "means": means}
    how = {"expert_size": m, "threads": case["threads"]}
    scores = scores_of(inputs["x"], **matrices)
    if case["selection"] == "given":
        slots = torch.stack([torch.randperm(experts, generator=generator)[: case["k"]] for _ in range(tokens)]).int()
        slots = slots.where(torch.rand(slots.shape, generator=generator) < 0.7, -1)
        y, _ = moe_ffn(**called, **how, experts=slots)
    elif case["selection"] == "top_k":
        y, slots = moe_ffn(**called, **how, k=case["k"], **matrices, shared=case["shared"])
        assert slots.shape == (tokens, case["k"]) and (slots.diff() > 0).all() and (slots >= 0).all()
        scores = torch.cat([torch.full((tokens, case["shared"]), torch.inf), scores], -1)
        others = scores.masked_fill(kept(slots, experts), -torch.inf)
        assert (others.amax(-1) <= scores.gather(-1, slots.long()).amin(-1) + 1e-5).all()
    else:
        choice = {name: case[name] for name in ("selection", "setting", "strengths", "shared")}
        y, slots = moe_ffn(**called, **how, **choice, **matrices)
        check_choice(slots, scores, **choice)
    called |= {"router": None, "keep": kept(slots, experts)}
    error = (y.double() - reference(**called)).abs()
    assert (error <= TOLERANCE[case["dtype"]] * (0.05 + sum_of_sizes(**called))).all()


def sum_of_sizes(
    down: torch.Tensor, down_bias: torch.Tensor | None, means: torch.Tensor | None, **inputs
) -> torch.Tensor:
    """(T, d): the sum of the absolute values of what an output is the sum of, which its rounding goes by."""
    neurons = reference(down=torch.eye(len(down)), down_bias=None, **inputs)  # (T, f)
    extra = (tensor.double().abs() for tensor in (down_bias, means) if tensor is not None)
    return neurons.abs() @ down.double().abs() + sum(each.reshape(-1, down.shape[1]).sum(0) for each in extra)
