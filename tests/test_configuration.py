"""Settings of a conversion: defaults, what they become in config.json, and what is refused."""

import json

import pytest

from moefy_hf import MoeficationConfig
from moefy_hf.modeling.allocation import ALLOCATIONS
from moefy_hf.modeling.moefied import FORMAT_VERSION
from moefy_hf.modeling.routers import ROUTERS
from moefy_hf.modeling.selection import SELECTIONS
from moefy_hf.splitters import SPLITTERS


def test_defaults_are_the_papers():
    config = MoeficationConfig()
    assert (config.num_experts, config.expert_size) == (None, 32)
    assert config.selection == {"type": "top_k", "k": 0.2}


def test_section_is_plain_json_and_complete():
    config = MoeficationConfig(num_experts=4, selection={"type": "top_k", "k": [1, 0.5]}, layers=[0, 2], seed=3)
    section = config.section()
    assert json.loads(json.dumps(section)) == section
    assert section.pop("format_version") == FORMAT_VERSION
    assert MoeficationConfig(**section) == config


def test_section_and_instances_share_nothing():
    a, b = MoeficationConfig(), MoeficationConfig()
    a.selection["k"] = 0.5
    assert b.selection["k"] == 0.2
    section = a.section()
    section["selection"]["allocation"] = "uniform"
    assert "allocation" not in a.selection


def test_number_of_experts_wins_over_their_size():
    config = MoeficationConfig(num_experts=6, expert_size=8)
    assert (config.num_experts, config.expert_size) == (6, None)


def test_one_of_number_and_size_is_needed():
    with pytest.raises(ValueError, match="num_experts or expert_size"):
        MoeficationConfig(expert_size=None)


@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_registered_names_are_accepted(splitter, router):
    assert MoeficationConfig(splitter=splitter, router=router).section()["router"] == router


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
        MoeficationConfig(**settings)
    assert all(name in str(error.value) for name in valid)


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, -0.1, "0.2", None, True, float("nan"), [], [0, 1]])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match="k"):
        MoeficationConfig(selection={"type": "top_k", "k": k})


def test_k_is_needed():
    with pytest.raises(ValueError, match="k"):
        MoeficationConfig(selection={"type": "top_k"})


@pytest.mark.parametrize("k", [1, 2**20, 1e-9, 0.2, 1.0, [1, 2], (0.1, 3)])
def test_k_in_range_is_accepted(k):
    assert MoeficationConfig(selection={"type": "top_k", "k": k}).selection["k"] == k


def test_a_list_of_k_cannot_be_allocated():
    with pytest.raises(ValueError, match="one k, not a list"):
        MoeficationConfig(selection={"type": "top_k", "k": [1, 2], "allocation": "sensitivity"})


@pytest.mark.parametrize("tokens", [0, -5, 0.5, "many", None])
def test_calibration_tokens_must_be_positive(tokens):
    with pytest.raises(ValueError, match="calibration_tokens"):
        MoeficationConfig(calibration_tokens=tokens)
