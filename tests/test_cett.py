"""CETT curves against loops over thresholds, and PPL-p% by what its thresholds do to the perplexity."""

import math

import pytest
import torch
from batches import real_count, text_batches
from tiny import tiny_model

from moefy_hf import profile
from moefy_hf.measure.hooks import run_with_hooks
from moefy_hf.measure.metrics import Quality, predictions
from moefy_hf.measure.sparsity import CettCurve, cett_curves, dropping, ppl_activation
from moefy_hf.modeling.ffn_sites import find_sites


def seen_neurons(model, batches) -> list[torch.Tensor]:
    """(T, f) of every FFN."""
    found = [[] for _ in find_sites(model)]
    with run_with_hooks(model, find_sites(model), lambda i, x, neurons, text: found[i].append(neurons)) as run:
        for batch in batches:
            run(batch)
    return [torch.cat(each) for each in found]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])  # opt: ReLU
def test_curves_are_those_of_loops(name):
    model, batches = tiny_model(name, "AutoModelForCausalLM"), text_batches(3)
    curves = cett_curves(model, batches, progress=False)
    for site, neurons, curve in zip(find_sites(model), seen_neurons(model, batches), curves, strict=True):
        down = site.weights().down.detach().double()
        a = neurons.double()
        assert curve.tokens == len(a) == real_count(batches)
        assert curve.zeros == pytest.approx(float((a == 0).double().mean()))
        assert (curve.zeros > 0.3) == (name == "opt")
        scores, whole = a.abs() * down.norm(dim=0), (a @ down.T).norm(dim=-1)
        assert len(curve.thresholds) > 15  # a ReLU's zeros take none of them
        for threshold, cett, active in zip(curve.thresholds, curve.cett, curve.active, strict=True):
            dropped = scores <= threshold * (1 + 1e-6)
            expected = ((a * dropped) @ down.T).norm(dim=-1) / whole
            assert cett == pytest.approx(float(expected.mean()), abs=2e-3)  # made monotone
            assert active == pytest.approx(float((~dropped).double().mean()), abs=2e-3)
        assert (curve.cett[0], curve.active[0]) == (0, pytest.approx(1 - curve.zeros))
        assert list(curve.cett) == sorted(curve.cett) and list(curve.active) == sorted(curve.active, reverse=True)


def test_between_points():
    curve = CettCurve(10, 0.0, (0.0, 1.0, 3.0), (0.0, 0.2, 1.0), (1.0, 0.5, 0.0))
    assert curve.at(0.1) == pytest.approx((0.5, 0.75)) and curve.at(0.6) == pytest.approx((2.0, 0.25))
    assert curve.at(0.0) == (0.0, 1.0) and curve.at(1.0) == (3.0, 0.0)
    with pytest.raises(ValueError, match="1.2"):
        curve.at(1.2)


def loss_at(model, batches, thresholds) -> tuple[float, torch.Tensor]:
    counts, sums = torch.zeros(2, 2, dtype=torch.float64), Quality()
    with torch.no_grad():
        for batch in batches:
            with dropping(model, find_sites(model), thresholds, batch, counts):
                logits, labels = predictions(model, batch)
            sums.update_(logits, logits, labels)
    return sums.loss / sums.labelled, counts


@pytest.mark.parametrize(("act", "growth"), [("silu", 0.05), ("relu", 0.02)])
def test_perplexity_grows_by_what_was_asked_for(act, growth):
    model = tiny_model("llama", "AutoModelForCausalLM", hidden_act=act)
    batches = text_batches(4, labels="causal")
    for batch in batches:  # labels that this model predicts, or perplexity would not grow
        with torch.no_grad():
            best = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        batch["labels"][:, 1:] = best[:, :-1].masked_fill(batch["labels"][:, 1:] == -100, -100)
    curves = cett_curves(model, batches, progress=False)
    found = ppl_activation(model, batches, curves, growth, progress=False)
    dense, _ = loss_at(model, batches, [-1.0, -1.0])
    loss, counts = loss_at(model, batches, [curve.at(found.cett)[0] for curve in curves])
    beyond, _ = loss_at(model, batches, [curve.at(found.cett + 2e-3)[0] for curve in curves])
    assert math.exp(loss - dense) - 1 == pytest.approx(found.growth) and found.growth <= growth
    assert math.exp(beyond - dense) - 1 > 0.8 * growth  # it stopped where it should
    assert found.active == pytest.approx((counts[:, 0] / counts[:, 1]).tolist()) and found.quality == "perplexity"
    assert 0.02 < found.cett < 1 and all(0 < active < 0.98 for active in found.active)
    less = ppl_activation(model, batches, curves, growth / 10, progress=False)
    assert less.cett < found.cett and sum(less.active) > sum(found.active)


def test_padding_does_not_count():
    model = tiny_model("llama", "AutoModelForCausalLM")
    batch = text_batches(1, labels="causal")[0]
    counts = torch.zeros(2, 2, dtype=torch.float64)
    with torch.no_grad(), dropping(model, find_sites(model), [0.0, 0.0], batch, counts):
        model(**batch)
    assert counts[:, 1].tolist() == [real_count([batch]) * 48] * 2
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"), [({"growth": 0}, "growth must be positive"), ({"tolerance": 2}, "between 0 and 1, got")]
)
def test_bad_settings_are_named(settings, message):
    model, batches = tiny_model("llama", "AutoModelForCausalLM"), text_batches(1)
    curves = cett_curves(model, batches, progress=False)
    with pytest.raises(ValueError, match=message):
        ppl_activation(model, batches, curves, **settings)
    with pytest.raises(ValueError, match="1 curves for 2 FFNs"):
        ppl_activation(model, batches, curves[:1])
    with pytest.raises(ValueError, match="needs labels"):
        ppl_activation(model, batches, curves, progress=False)
    with pytest.raises(ValueError, match="nothing to measure"):
        cett_curves(model, [], progress=False)


@pytest.mark.parametrize("measure", ["profile", "sparsity"])
def test_bars_move_within_a_batch(measure, monkeypatch):
    """A batch of a large model takes minutes: every FFN, and every 512 tokens of it for CETT, is a step."""
    steps: list[float] = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, tokens):
            steps.append(tokens)

    monkeypatch.setattr(f"moefy_hf.measure.{measure}.token_bar", lambda *args: Bar())
    monkeypatch.setattr("moefy_hf.measure.sparsity.AT_ONCE", 10)
    model, batches = tiny_model("llama", "AutoModelForCausalLM"), text_batches(1)
    tokens = real_count(batches)
    if measure == "profile":
        profile(model, batches, sample=False)
    else:
        cett_curves(model, batches)
    each = 1 if measure == "profile" else math.ceil(tokens / 10)
    assert len(steps) == 2 * each and sum(steps) == pytest.approx(tokens)
