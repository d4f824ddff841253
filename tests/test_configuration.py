"""Settings of a conversion: defaults, what they become in config.json, and what is refused."""

import argparse
import dataclasses
import json

import pytest

from moefy_hf import MoEficationConfig
from moefy_hf.arguments import add_arguments, default_of, given
from moefy_hf.config import overrule
from moefy_hf.modeling.budget_allocation import ALLOCATIONS
from moefy_hf.modeling.routers import ROUTERS
from moefy_hf.modeling.section import FORMAT_VERSION
from moefy_hf.modeling.selection import SELECTIONS
from moefy_hf.splitters import SPLITTERS


def test_defaults_are_the_papers():
    config = MoEficationConfig()
    assert (config.num_experts, config.expert_size) == (None, 32)
    assert config.section()["selection"] == {"type": "top_k", "k": 0.2}


def test_section_is_plain_json_and_complete():
    config = MoEficationConfig(num_experts=4, selection={"type": "top_k", "k": [1, 0.5]}, layers=[0, 2], seed=3)
    section = config.section()
    assert json.loads(json.dumps(section)) == section
    assert section.pop("format_version") == FORMAT_VERSION
    assert MoEficationConfig(**section) == config


def test_section_and_instances_share_nothing():
    a, b = MoEficationConfig(k=[1, 2]), MoEficationConfig()
    a.router_settings["rank"] = 3
    assert b.router_settings == {}
    section = a.section()
    section["selection"]["allocation"] = "uniform"
    section["selection"]["k"][0] = 7
    assert (a.k, a.allocation) == ([1, 2], "auto")


def test_settings_have_names():
    with pytest.raises(TypeError):
        MoEficationConfig(64)


@pytest.mark.parametrize(
    ("settings", "given", "left"),
    [
        ({"num_experts": 64, "expert_size": 16}, {"expert_size"}, {"expert_size": 16}),
        (
            {"num_experts": 64, "expert_size": 16},
            {"num_experts", "expert_size"},
            {"num_experts": 64, "expert_size": 16},
        ),
        ({"threshold": 0.9, "k": 0.3}, {"k"}, {"k": 0.3}),
        ({"threshold": 0.9, "k": 0.3}, {"threshold"}, {"threshold": 0.9, "k": 0.3}),
        ({"num_experts": 64, "k": 0.3}, {"k"}, {"num_experts": 64, "k": 0.3}),
    ],
)
def test_what_is_said_later_overrules(settings, given, left):
    assert overrule(settings, given) == left


def test_number_of_experts_wins_over_their_size():
    config = MoEficationConfig(num_experts=6, expert_size=8)
    assert (config.num_experts, config.expert_size) == (6, None)


def test_one_of_number_and_size_is_needed():
    with pytest.raises(ValueError, match="num_experts or expert_size"):
        MoEficationConfig(expert_size=None)


@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_registered_names_are_accepted(splitter, router):
    assert MoEficationConfig(splitter=splitter, router=router).section()["router"] == router


@pytest.mark.parametrize(
    ("settings", "valid"),
    [
        ({"splitter": "kmeans"}, SPLITTERS),
        ({"router": "softmax"}, ROUTERS),
        ({"router": "partial_input", "router_settings": {"rank": 3}}, ROUTERS["partial_input"].settings),
        ({"selection": {"type": "best", "k": 0.2}}, SELECTIONS),
        ({"selection": {"k": 0.2}}, SELECTIONS),
        ({"selection": {"type": "top_k", "k": 0.2, "allocation": "greedy"}}, ALLOCATIONS),
        ({"selection": {"type": "top_k", "k": 0.2, "share": 0.2}}, ("type", "k", "allocation")),
    ],
)
def test_unknown_names_list_the_valid_ones(settings, valid):
    with pytest.raises(ValueError) as error:
        MoEficationConfig(**settings)
    assert all(name in str(error.value) for name in valid)


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, -0.1, "0.2", None, True, float("nan"), [], [0, 1]])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match="k"):
        MoEficationConfig(selection={"type": "top_k", "k": k})


def test_k_is_needed():
    with pytest.raises(ValueError, match="k"):
        MoEficationConfig(selection={"type": "top_k"})


@pytest.mark.parametrize("k", [1, 2**20, 1e-9, 0.2, 1.0, [1, 2], (0.1, 3)])
def test_k_in_range_is_accepted(k):
    assert MoEficationConfig(selection={"type": "top_k", "k": k}).k == k
    assert MoEficationConfig(k=k).section()["selection"]["k"] == k


def test_a_selection_is_flat_fields_or_what_config_json_holds():
    whole = {"type": "top_p", "p": [0.5, 0.9]}
    assert MoEficationConfig(selection=whole) == MoEficationConfig(selection="top_p", threshold=[0.5, 0.9])
    assert MoEficationConfig(selection=whole).section()["selection"] == whole
    flat = MoEficationConfig(selection="level", k=0.3, allocation="global")
    assert flat.section()["selection"] == {"type": "level", "k": 0.3, "allocation": "global"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threshold": 0.5}, "threshold, top_p, level"),
        ({"selection": "top_p", "threshold": 0.5, "allocation": "sensitivity"}, "leave out the allocation"),
        ({"selection": "top_p", "threshold": 1.5}, "from 0 to 1"),
        ({"allocation": "greedy"}, "sensitivity"),
    ],
)
def test_a_threshold_is_of_a_dynamic_selection(settings, said):
    with pytest.raises(ValueError, match=said):
        MoEficationConfig(**settings)


def test_what_needs_data_is_named():
    free = MoEficationConfig(splitter="random", router="similarity")
    assert free.needs() == []
    assert MoEficationConfig(splitter="random", router="similarity", allocation="angular").needs() == [
        'allocation "angular"'
    ]
    everything = MoEficationConfig(selection="top_p", shared_experts=1, compensation=True).needs()
    assert everything == [
        "splitter 'coactivation'",
        "router 'linear'",
        "selection 'top_p' with a budget k",
        "shared_experts",
        "compensation",
    ]


def test_the_command_line_has_every_field_with_its_default():
    parser = argparse.ArgumentParser()
    add_arguments(parser, MoEficationConfig)
    assert given(parser.parse_args([]), MoEficationConfig) == {}
    said = parser.parse_args("--k 3 --compensation --router low_rank --router_settings rank=3 --layers 0 2".split())
    config = MoEficationConfig(**given(said, MoEficationConfig))
    assert (config.k, config.compensation, config.router_settings, config.layers) == (3, True, {"rank": 3}, [0, 2])
    text = " ".join(parser.format_help().split())
    for each in dataclasses.fields(MoEficationConfig):
        default = default_of(each)
        assert f"--{each.name} " in text and each.metadata["help"].split(";")[0][:20] in text
        assert default in (None, {}) or f"(default: {default})" in text


def test_a_list_of_k_cannot_be_allocated():
    with pytest.raises(ValueError, match="one k, not a list"):
        MoEficationConfig(selection={"type": "top_k", "k": [1, 2], "allocation": "sensitivity"})


@pytest.mark.parametrize("tokens", [0, -5, 0.5, "many", None])
def test_calibration_tokens_must_be_positive(tokens):
    with pytest.raises(ValueError, match="calibration_tokens"):
        MoEficationConfig(calibration_tokens=tokens)
