"""The towers of a composite model have names, and its text tower is what is converted by default."""

import pytest
from tiny import tiny_model

from moefy_hf.discovery.towers import tower_of
from moefy_hf.errors import MoefyError
from moefy_hf.modeling.ffn_sites import find_sites

TEXT = [f"text_model.encoder.layers.{i}.mlp" for i in range(2)]
VISION = [f"vision_model.encoder.layers.{i}.mlp" for i in range(2)]


@pytest.mark.parametrize(
    ("towers", "names"),
    [
        (None, TEXT),
        ("text", TEXT),
        ("vision", VISION),
        (["vision"], VISION),
        (["text", "vision"], [*TEXT, *VISION]),
        ("all", [*TEXT, *VISION]),
        (["all"], [*TEXT, *VISION]),
    ],
)
def test_towers_of_clip(towers, names):
    assert [site.name for site in find_sites(tiny_model("clip"), towers)] == names


@pytest.mark.parametrize("towers", ["audio", ["text", "audio"], "Text", ""])
def test_a_tower_that_is_not_there(towers):
    with pytest.raises(MoefyError, match=r"has no tower '.*' with FFNs; choose from 'text', 'vision', 'all'"):
        find_sites(tiny_model("clip"), towers)


def test_where_a_module_lies():
    model = tiny_model("clip")
    assert tower_of(model, VISION[0]) == "vision" and tower_of(model, TEXT[1]) == "text"
    assert tower_of(model, "visual_projection") is None and tower_of(model, "") is None


@pytest.mark.parametrize(("name", "count"), [("bert", 2), ("bart", 4), ("vit", 2), ("whisper", 4)])
def test_a_model_without_towers_is_taken_whole(name, count):
    """Encoder and decoder are no towers."""
    model = tiny_model(name)
    assert len(find_sites(model)) == len(find_sites(model, "all")) == count
    with pytest.raises(MoefyError, match="has no tower 'text' with FFNs; choose from 'all'"):
        find_sites(model, "text")


def test_a_head_on_one_tower_is_that_tower():
    model = tiny_model("clip", "AutoModelForImageClassification")
    assert [site.name for site in find_sites(model)] == VISION == [site.name for site in find_sites(model, "vision")]
