"""Other routers on the same experts: as if the model had been converted with them, or not at all."""

import copy

import pytest
import torch
from batches import text_batches
from tiny import tiny_model

from moefy_hf import MoEficationConfig, calibrate_thresholds_, moefy_, profile, reroute_
from moefy_hf.modeling.routers import ROUTERS


def config(router: str, **changes) -> MoEficationConfig:
    settings = {"expert_size": 8, "splitter": "gate_clustering", "shared_experts": 1, "seed": 3}
    selection = {"type": "top_k", "k": 0.5, "allocation": "uniform"}
    return MoEficationConfig(router=router, **({"selection": selection} | settings | changes))


@pytest.fixture(scope="module")
def batches():
    return text_batches(20, rows=8, length=16)


@pytest.fixture(scope="module")
def found(batches):
    torch.manual_seed(0)
    with profile(tiny_model("llama"), batches, max_tokens=2000, progress=False) as found:
        yield found


def converted(router: str, found, **changes):
    torch.manual_seed(0)
    model = tiny_model("llama")
    moefy_(model, config(router, **changes), found, progress=False)
    return model


@pytest.mark.parametrize("router", ROUTERS)
def test_as_if_it_had_been_converted_so(router, found, batches):
    model = converted("random", found)
    fits = reroute_(model, router, found, seed=3, progress=False)
    expected = converted(router, found)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.config.moefication == expected.config.moefication and len(fits) == 2
    assert not any(weight.requires_grad for site in model.moe_sites() for weight in site.act.router.parameters())
    with torch.no_grad():
        assert torch.equal(model(**batches[0])[0], expected(**batches[0])[0])


def test_a_saved_model_has_the_new_routers(found, tmp_path):
    model = converted("linear", found)
    reroute_(model, "similarity")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.moefication["router"] == "similarity"
    assert all(type(site.act.router).__name__ == "SimilarityRouter" for site in again.moe_sites())
    for site, loaded in zip(model.moe_sites(), again.moe_sites(), strict=True):
        assert torch.equal(site.act.router.centres, loaded.act.router.centres)


def test_settings_of_a_router_stay_with_the_model(found, tmp_path):
    model = converted("linear", found)
    reroute_(model, "low_rank", found, settings={"rank": 3}, progress=False)
    expected = converted("low_rank", found, router_settings={"rank": 3})
    assert model.config.moefication == expected.config.moefication
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {tuple(site.act.router.proj_in.shape) for site in again.moe_sites()} == {(3, again.config.hidden_size)}
    reroute_(again, "similarity")
    assert again.config.moefication["router_settings"] == {}


def test_a_model_of_an_older_format_is_of_this_one_then(found):
    """Else code of that format would read it, and make routers without their settings."""
    model = converted("linear", found)
    del model.config.moefication["router_settings"]
    model.config.moefication["format_version"] = 2
    reroute_(model, "partial_input", settings={"inputs": 0.5})
    expected = converted("partial_input", found, router_settings={"inputs": 0.5})
    assert model.config.moefication == expected.config.moefication


def test_what_old_routers_measured_is_forgotten(found):
    model = converted("linear", found)
    calibrate_thresholds_(model, found, ["threshold"], progress=False)
    reroute_(model, "similarity")
    assert "reach" not in model.config.moefication
    with pytest.raises(ValueError, match="calibrate_thresholds_"):
        model.set_selection(type="threshold", k=0.5)


@pytest.mark.parametrize(
    ("router", "changes", "message"),
    [
        ("linaer", {}, "unknown router 'linaer'; choose from linear, low_rank"),
        ("linear", {}, "router 'linear' is fitted to data: give a profile, or choose from analytic"),
        ("similarity", {"selection": {"type": "level", "k": 0.5, "allocation": "uniform"}}, "first model.set_selec"),
        ("similarity", {"compensation": True}, "no compensation"),
    ],
)
def test_bad_input_changes_nothing(router, changes, message, found):
    model = converted("linear", found, **changes)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.moefication)
    with pytest.raises(ValueError, match=message):
        reroute_(model, router)
    assert model.config.moefication == before[1]
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before[0].items())


def test_a_setting_that_a_router_has_not_changes_nothing(found):
    model = converted("linear", found)
    old = [site.act.router for site in model.moe_sites()]
    with pytest.raises(ValueError, match="PartialInputRouter has no setting 'rank': choose from inputs"):
        reroute_(model, "partial_input", settings={"rank": 3})
    assert [site.act.router for site in model.moe_sites()] == old and model.config.moefication["router"] == "linear"


def test_a_profile_that_is_too_small(found, batches):
    model = converted("similarity", found)
    old = [site.act.router for site in model.moe_sites()]
    with profile(model, batches[:1], max_tokens=8, progress=False) as few:
        with pytest.raises(ValueError, match="at least 32 are needed"):
            reroute_(model, "linear", few)
    assert [site.act.router for site in model.moe_sites()] == old
    assert model.config.moefication["router"] == "similarity"


def test_a_dense_model(found):
    with pytest.raises(ValueError, match="LlamaModel is not MoEfied"):
        reroute_(tiny_model("llama"), "linear", found)
