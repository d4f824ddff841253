"""As many experts as a token needs, chosen by the kernel, against moefy_hf's selections of strengths in float64."""

import math

import pytest
import torch
from masked import close, kept, low_rank, made, reference, scores_of
from moefy_ffn import STRENGTHS, MoeFfn, moe_ffn

from moefy_hf.modeling.selection import SELECTIONS

SETTINGS = {"threshold": (0.3, 0.9), "top_p": (0.3, 0.8), "level": (1.0, 2.5)}
REFERENCE = {"softmax": lambda scores: scores.softmax(-1), "sigmoid": torch.sigmoid}


def check_choice(experts, scores, selection: str, setting: float, strengths: str, shared: int) -> None:
    """experts (T, S + E), scores (T, E) in float64: the best run, as many as have needs within the setting, give or
    take those that rounding decides on."""
    count = shared + scores.shape[-1]
    assert experts.dtype == torch.int32 and experts.shape == (len(scores), count)
    assert ((experts == torch.arange(count)) | (experts == -1)).all()
    keep = kept(experts, count)
    assert keep[:, :shared].all()
    keep = keep[:, shared:]
    assert (scores.where(~keep, -torch.inf).amax(-1) <= scores.where(keep, torch.inf).amin(-1) + 1e-5).all()
    needs = SELECTIONS[selection].needs(REFERENCE[strengths](scores))
    least, most = ((needs <= setting + each).sum(-1) for each in (-1e-5, 1e-5))
    assert (least <= keep.sum(-1)).all() and (keep.sum(-1) <= most).all()


def chosen_by(scores: list[float], shared: int = 0, **settings) -> list[int]:
    """The experts that run for a token of exactly these scores: one input, which is 1."""
    router, neurons = torch.tensor(scores).unsqueeze(-1), torch.ones(len(scores) + shared, 1)
    given = {"expert_size": 1, "activation": "relu", "router": router, "shared": shared}
    y, experts = moe_ffn(torch.ones(1, 1), neurons, neurons, **given, **settings)
    found = experts[experts >= 0].tolist()
    assert y.item() == len(found)  # each adds 1
    return found


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("tokens", [1, 9, 300])
@pytest.mark.parametrize(
    ("dtype", "router_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize("selection", SETTINGS)
def test_experts_and_outputs(selection, strengths, dtype, router_dtype, tokens, shared):
    for threads, setting in enumerate(SETTINGS[selection], 1):
        inputs = made(tokens, 72, 21, 4, gated=True, biased=True, dtype=dtype)
        inputs["router"] = inputs["router"][shared:].to(router_dtype).contiguous()
        if threads == 2 and router_dtype == torch.float32:
            inputs |= low_rank(inputs["router"], 9)
        means = 0.1 * torch.randn(21, 72).to(dtype) if setting > 0.5 else None
        how = {"selection": selection, "setting": setting, "strengths": strengths, "shared": shared}
        y, experts = moe_ffn(**inputs, expert_size=4, activation="silu", means=means, threads=threads, **how)
        check_choice(experts, scores_of(inputs["x"], inputs["router"], inputs.get("router_in")), **how)
        close(y, reference(**inputs, keep=kept(experts, 21), activation="silu", means=means))


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("strengths", STRENGTHS)
def test_experts_at_the_threshold_run(strengths, shared):
    """Strengths that floats hold exactly: 1/8 each by softmax, 1/2 by sigmoid."""

    def found(selection: str, setting: float, scores: list[float]) -> list[int]:
        how = {"selection": selection, "setting": setting, "strengths": strengths}
        found = chosen_by(scores, shared, **how)
        needs = SELECTIONS[selection](setting)(REFERENCE[strengths](torch.tensor(scores)))[1]
        assert found == [*range(shared), *(needs.nonzero().flatten() + shared).tolist()]  # as masked, exactly
        return [e - shared for e in found[shared:]]

    equal, everyone = [0.0] * 8, list(range(8))
    assert found("threshold", 0.0, equal) == everyone
    assert found("threshold", 0.0, [0.0, 2, -1, 2]) == [1, 3]
    level = math.log(8 if strengths == "softmax" else 2)
    assert found("level", level, equal) == everyone and found("level", math.nextafter(level, 0) - 1e-6, equal) == []
    assert found("top_p", 0.0, equal) == [0]  # of equals the first
    assert found("top_p", 0.25, equal) == [0, 1, 2] and found("top_p", 0.2499, equal) == [0, 1]
    for selection in ("threshold", "top_p"):
        assert found(selection, 1.0, [50.0, -50, 0, 100, -100]) == everyone[:5]
        assert found(selection, 1.0, [-200.0] * 3) == [0, 1, 2]  # sigmoids are zero
    assert found("level", 70.0, [200.0, -200, 0]) == [0, 1, 2] and found("level", -0.5, [200.0, -200, 0]) == []
    assert found("level", 0.0, [200.0, -200, 0]) == [0]


@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize("selection", SETTINGS)
def test_nan_and_inf_scores_as_masked(selection, strengths):
    inf, nan = math.inf, math.nan
    for scores in ([0, nan, 1, -1], [nan] * 4, [0, inf, 1, -1], [inf] * 4, [0, -inf, 1, -1], [-inf] * 4, [inf, nan]):
        for setting in (*SETTINGS[selection], 1.0):
            needs = SELECTIONS[selection](setting)(REFERENCE[strengths](torch.tensor(scores, dtype=torch.float32)))[1]
            found = chosen_by(scores, selection=selection, setting=setting, strengths=strengths)
            assert found == needs.nonzero().flatten().tolist(), scores


@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize("selection", SETTINGS)
def test_many_experts_and_any_setting(selection, strengths):
    """Needs of single experts as thresholds, as `calibrate_thresholds_` finds them; equal needs come along."""
    size = 8 if strengths == "softmax" else 2  # sigmoids of larger ones are all 1
    scores = size * torch.randn(700, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    needs = SELECTIONS[selection].needs(REFERENCE[strengths](scores))
    for setting in (needs.sort().values[::50] + 1e-5).clamp_max(1 if selection != "level" else math.inf).tolist():
        how = {"selection": selection, "setting": setting, "strengths": strengths}
        experts = chosen_by(scores.tolist(), **how)
        slots = torch.full((1, 700), -1, dtype=torch.int32)
        slots[0, experts] = torch.tensor(experts, dtype=torch.int32)
        check_choice(slots, scores.double().unsqueeze(0), **how, shared=0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 50, 600])
@pytest.mark.parametrize("selection", [*SETTINGS, "top_k"])
def test_within_a_share_of_the_experts(selection, tokens, threads):
    """Computed, to the same bits, where the tokens' experts are no more than that share, and else not at all."""
    inputs = made(tokens, 40, 16, 4, gated=False, biased=True)
    x = inputs.pop("x")
    budget = {"setting": SETTINGS[selection][1]} if selection in SETTINGS else {"k": 5}
    how = budget | {"selection": selection, "expert_size": 4, "activation": "gelu", "threads": threads}
    ffn = MoeFfn(**inputs, **how)
    y, experts = ffn(x)
    count = int((experts >= 0).sum())
    assert torch.equal(ffn.within(x, (count + 0.5) / (16 * tokens)), y)
    assert ffn.within(x, (count - 0.5) / (16 * tokens)) is None
    assert torch.equal(ffn.within(x, 1.0), y) and ffn.within(x[:0], 0.0).shape == (0, 40)
    with pytest.raises(ValueError, match="with a router"):
        MoeFfn(**{**inputs, "router": None}, expert_size=4, activation="gelu").within(x, 0.5)


BAD = [
    ({"selection": "top_q"}, "unknown selection 'top_q'; choose from top_k, threshold, top_p, level"),
    ({"strengths": "relu"}, "unknown strengths 'relu'; choose from softmax, sigmoid"),
    ({"k": 2}, "'threshold' with k=2, setting=0.3: top_k has k, others a router and a setting"),
    ({"setting": None}, "'threshold' with k=None, setting=None"),
    ({"router": None}, "others a router"),
    ({"selection": "top_k", "k": 2}, "'top_k' with k=2, setting=0.3"),
    ({"shared": 7}, "does not fit 24 neurons and 7 shared experts"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes, message):
    how = {"selection": "threshold", "setting": 0.3, "expert_size": 4, "activation": "relu"}
    with pytest.raises(ValueError, match=message):
        moe_ffn(**{**made(2, 32, 6, 4, False, False), **how, **changes})
