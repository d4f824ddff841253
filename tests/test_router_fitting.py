"""Routers are fitted to what experts do: on a planted problem, measured against loops, the best epoch kept."""

import copy

import pytest
import torch
from batches import real_count, text_batches
from tiny import tiny_config, tiny_model

from moefy_hf import MoEficationConfig, calibrate_thresholds_, fit_routers_, profile
from moefy_hf.conversion.fit_routers import tokens_needed
from moefy_hf.conversion.permute import permute_neurons_
from moefy_hf.loading import moefied_class
from moefy_hf.measure.profile import ModelProfile
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.routers import ROUTERS

EXPERTS, SIZE, WIDTH = 8, 8, 16
TRAINABLE = [name for name, router in ROUTERS.items() if router.trainable]
OTHERS = [name for name, router in ROUTERS.items() if not router.trainable]


def routed_bert(router: str, planted: bool = False, seed: int = 0):
    """A ReLU BERT with random routers. Planted: the neurons of expert e all fire on x with a positive part along
    direction e, so that a linear router can know what they will do."""
    torch.manual_seed(seed)
    changes = {"hidden_act": "relu", "intermediate_size": EXPERTS * SIZE}
    dense = tiny_model("bert", **changes)
    config = tiny_config("bert", **changes)
    selection = {"type": "top_k", "k": 1.0}
    config.moefication = MoEficationConfig(expert_size=SIZE, router=router, selection=selection).section()
    model = moefied_class(type(dense))(config).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    if planted:
        for site in find_sites(model):
            directions = torch.linalg.qr(torch.randn(WIDTH, EXPERTS))[0].T  # (E, d)
            rows = directions.repeat_interleave(SIZE, 0) + 0.02 * torch.randn(EXPERTS * SIZE, WIDTH)
            with torch.no_grad():
                site.up.weight.copy_(3 * rows)
                site.up.bias.zero_()
    return model


@pytest.fixture(scope="module")
def batches():
    return text_batches(20, rows=8, length=16)


@torch.no_grad()
def by_hand(model, found: ModelProfile, position: int, k: int) -> dict[str, float]:
    """What a router captures of its targets on the held-out last tenth, with loops over tokens and experts."""
    site, inputs = model.moe_sites()[position], found.sites[position].inputs
    router, read = site.act.router, inputs
    if type(router).__name__ == "PreGatedRouter":  # of the first layer, for all
        router, read = model.moe_sites()[0].act.router, found.sites[0].inputs
    held_out = slice(len(inputs) - len(inputs) // 10, None)
    kind = site.act.router.targets.__name__
    captured = oracle = total = 0.0
    for x, seen in zip(inputs[held_out], read[held_out], strict=True):
        neurons = torch.relu(site.up.weight @ x + site.up.bias)
        target, whole = [], site.down.weight @ neurons
        for expert in range(EXPERTS):
            block = slice(expert * SIZE, (expert + 1) * SIZE)
            output = site.down.weight[:, block] @ neurons[block]
            found_by = {
                "activation_mass": neurons[block].sum(),
                "output_norm": output.norm(),
                "prior_affinity": (-(output - whole).square().mean()).exp(),
            }
            target.append(float(found_by[kind]))
        if kind == "prior_affinity":
            target = [each / sum(target) for each in target]
        scores = router(seen).tolist()
        order = sorted(range(EXPERTS), key=lambda expert, scores=scores: -scores[expert])
        captured += sum(target[expert] for expert in order[:k])
        oracle += sum(sorted(target)[-k:])
        total += sum(target)
    return {"captured": captured / total, "oracle": oracle / total}


@pytest.mark.parametrize("router", ROUTERS)
def test_figures_are_those_of_a_loop(router, batches):
    model = routed_bert(router)
    with profile(model, batches, progress=False) as found:
        fits = fit_routers_(model, found, epochs=2, progress=False)
        for position, fit in enumerate(fits):
            expected = by_hand(model, found, position, 1)  # a fifth of 8 experts; of the router as it was left
            assert fit.captured == pytest.approx(expected["captured"], abs=1e-4)
            assert fit.oracle == pytest.approx(expected["oracle"], abs=1e-4)
            assert fit.random == pytest.approx(1 / EXPERTS) and fit.k == 1
            assert 0 <= fit.captured <= fit.oracle <= 1
            assert fit.name == model.moe_sites()[position].name
            assert set(fit.to_dict()) == {"name", "k", "captured", "oracle", "random", "best_epoch"}


def test_k_follows_the_model_up_to_a_fifth(batches):
    model = routed_bert("linear")
    with profile(model, batches, progress=False) as found:
        assert [fit.k for fit in fit_routers_(model, found, epochs=0, progress=False)] == [1, 1]
    model = routed_bert("linear")
    model.config.moefication |= {"expert_size": 4, "num_experts": None}
    model = type(model)(model.config)  # 16 experts
    with profile(model, batches, progress=False) as found:
        model.set_selection(k=[2, 16])
        assert [fit.k for fit in fit_routers_(model, found, epochs=0, progress=False)] == [2, 3]


@pytest.mark.parametrize("router", TRAINABLE)
def test_learns_a_planted_problem(router, batches):
    model = routed_bert(router, planted=True)
    with profile(model, batches, progress=False) as found:
        start = fit_routers_(model, found, epochs=0, progress=False)
        fits = fit_routers_(model, found, epochs=30, lr=0.02, progress=False)
    for before, after in zip(start, fits, strict=True):
        assert before.best_epoch == 0 < after.best_epoch
        assert after.oracle == before.oracle  # the targets do not depend on the router
        assert after.captured > before.captured + 0.3 * (after.oracle - before.captured)
        assert after.captured > after.random + 0.6 * (after.oracle - after.random)


def test_linear_router_nearly_finds_planted_experts(batches):
    model = routed_bert("linear", planted=True)
    with profile(model, batches, progress=False) as found:
        for fit in fit_routers_(model, found, epochs=20, lr=0.01, progress=False):
            assert fit.captured > 0.85 * fit.oracle


@pytest.mark.parametrize("router", TRAINABLE)
def test_never_worse_than_the_start(router, batches, monkeypatch):
    model = routed_bert(router, planted=True)
    with profile(model, batches, progress=False) as found:
        good = fit_routers_(model, found, epochs=15, lr=0.01, progress=False)
        weights = copy.deepcopy([site.act.router.state_dict() for site in model.moe_sites()])
        loss = ROUTERS[router].loss
        monkeypatch.setattr(ROUTERS[router], "loss", lambda *inputs: -loss(*inputs))  # away from the targets
        ruined = fit_routers_(model, found, epochs=2, lr=0.1, progress=False)
    for before, after, state, site in zip(good, ruined, weights, model.moe_sites(), strict=True):
        assert after.captured >= before.captured
        if after.best_epoch == 0:
            assert all(torch.equal(state[name], weight) for name, weight in site.act.router.state_dict().items())
    assert any(fit.best_epoch == 0 for fit in ruined)  # or this test would have tested nothing


def test_deterministic_under_the_seed(batches):
    states = []
    for seed in (3, 3, 4):
        model = routed_bert("linear")
        with profile(model, batches, progress=False) as found:
            fit_routers_(model, found, epochs=2, seed=seed, progress=False)
        states.append(torch.cat([site.act.router.weight.flatten() for site in model.moe_sites()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("router", ROUTERS)
def test_only_routers_change_and_end_frozen(router, batches):
    model = routed_bert(router)
    before = copy.deepcopy(model.state_dict())
    with profile(model, batches, progress=False) as found:
        fits = fit_routers_(model, found, epochs=2, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(".router." in name for name in changed)
    assert bool(changed) is (router in TRAINABLE)
    assert all(fit.best_epoch == 0 for fit in fits) or router in TRAINABLE
    for site in model.moe_sites():
        assert all(not weight.requires_grad for weight in site.act.router.parameters())
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


def test_neurons_may_be_permuted_after_profiling(batches):
    """The sample holds FFN inputs, which do not depend on the order of neurons."""
    model = routed_bert("linear")
    with profile(model, batches, progress=False) as found:
        for site in model.moe_sites():
            permute_neurons_(site, torch.randperm(EXPERTS * SIZE))
        for position, fit in enumerate(fit_routers_(model, found, epochs=1, progress=False)):
            assert fit.oracle == pytest.approx(by_hand(model, found, position, 1)["oracle"], abs=1e-4)


def test_bf16_model_keeps_float32_routers(batches):
    model = routed_bert("linear", planted=True).to(torch.bfloat16)
    for site in model.moe_sites():
        site.act.router.float()
    with profile(model, batches, progress=False) as found:
        fits = fit_routers_(model, found, epochs=5, lr=0.01, progress=False)
    assert all(site.act.router.weight.dtype == torch.float32 for site in model.moe_sites())
    assert all(fit.captured > fit.random + 0.5 * (fit.oracle - fit.random) for fit in fits)


def test_one_layer_does_not_depend_on_the_others(batches):
    model, again = routed_bert("linear"), routed_bert("linear")
    with profile(model, batches, progress=False) as found:
        fit_routers_(model, found, epochs=2, progress=False)
        with torch.no_grad():
            again.moe_sites()[0].act.router.weight.zero_()
        fit_routers_(again, found, epochs=2, progress=False)
    assert torch.equal(model.moe_sites()[1].act.router.weight, again.moe_sites()[1].act.router.weight)


def test_too_few_tokens_names_both_numbers():
    model = routed_bert("linear")
    few = text_batches(1, rows=2, length=9)
    assert tokens_needed(WIDTH, EXPERTS) == 2 * WIDTH > real_count(few)
    before = copy.deepcopy(model.state_dict())
    with profile(model, few, progress=False) as found:
        with pytest.raises(ValueError, match=rf"\b{real_count(few)}\b.*\b{2 * WIDTH}\b"):
            fit_routers_(model, found, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("router", OTHERS)
def test_routers_that_learn_nothing_need_few_tokens(router):
    model = routed_bert(router)
    with profile(model, text_batches(1, rows=1, length=1), progress=False) as found:
        assert found.tokens == 1
        assert len(fit_routers_(model, found, progress=False)) == 2


def test_profile_of_another_model_is_refused(batches):
    model = routed_bert("linear")
    with profile(model, batches, layers=[0], progress=False) as found:
        with pytest.raises(ValueError, match="1 layers, the model 2"):
            fit_routers_(model, found, progress=False)


def test_profile_without_a_sample_is_refused(batches):
    model = routed_bert("linear")
    with pytest.raises(ValueError, match="sample"):
        fit_routers_(model, profile(model, batches, sample=False, progress=False), progress=False)
    with profile(model, batches, progress=False) as found:
        pass
    with pytest.raises(ValueError, match="sample"):  # closed
        fit_routers_(model, found, progress=False)


def test_what_selections_spend_is_measured_anew(batches):
    model = routed_bert("linear", planted=True)
    with profile(model, batches, progress=False) as found:
        calibrate_thresholds_(model, found, ["threshold", "level"], progress=False)
        model.set_selection(type="threshold", k=0.5)
        stale = copy.deepcopy(model.config.moefication["reach"])
        fit_routers_(model, found, progress=False)
        fitted = copy.deepcopy(model.config.moefication["reach"])
        calibrate_thresholds_(model, found, ["threshold", "level"], progress=False)
    assert model.config.moefication["reach"] == fitted != stale and fitted.keys() == stale.keys()
    before = [site.act.selection.threshold for site in model.moe_sites()]
    model.set_selection()
    assert [site.act.selection.threshold for site in model.moe_sites()] == before
