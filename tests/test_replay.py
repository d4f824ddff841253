"""Replayed layers change nothing, in any architecture, and are indeed not run."""

import pytest
import torch
from tiny import NAMES, tiny, tiny_inputs, tiny_model, tiny_moefied
from torch import nn

from moefy_hf.conversion.replay import before, block_of, recorded, replayed
from moefy_hf.modeling.ffn_sites import find_sites

CACHING = ("llama", "gpt2", "opt", "t5", "bart", "gpt_neox", "qwen3", "gemma3_text", "phi3")  # decoders with a cache


def first(output) -> torch.Tensor:
    return output[0] if not hasattr(output, "last_hidden_state") else output.last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_replaying_changes_nothing(name, cache):
    if cache and name not in CACHING:
        pytest.skip("has no cache of keys and values")
    model, inputs = tiny_moefied(name, k=1.0), tiny_inputs(name)
    model.config.use_cache = cache
    sites = model.moe_sites()
    blocks = [block_of(model, site) for site in sites]
    assert len({id(block) for block in blocks}) == len(blocks) == tiny(name).ffns and None not in blocks
    with recorded(blocks) as outputs:
        dense = first(model(**inputs))
    assert set(outputs) == set(blocks)
    for position, (site, block) in enumerate(zip(sites, blocks, strict=True)):
        everything = site.act.selection
        site.act.selection = type(everything)(k=1)
        expected, seen = first(model(**inputs)), []
        handle = site.up.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        others = [s for s in sites if block_of(model, s) in before(outputs, block)]
        counts = [s.up.register_forward_pre_hook(lambda *_, seen=seen: seen.append(-1)) for s in others]
        with replayed(before(outputs, block)):
            found = first(model(**inputs))
        assert seen == [1]  # this FFN ran, those before it did not
        for each in (handle, *counts):
            each.remove()
        assert len(others) == len(before(outputs, block)) and (position == 0 or others or name == "clip")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, dense)
        site.act.selection = everything
    torch.testing.assert_close(first(model(**inputs)), dense, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(block) for block in blocks)


def test_a_block_that_runs_twice_is_not_recorded():
    block = nn.Linear(2, 2)
    with recorded([block]) as outputs:
        block(block(torch.ones(1, 2)))
    assert outputs == {} and before(outputs, block) == {}


def test_a_block_keeps_its_own_forward():
    block, mine = nn.Linear(2, 2), lambda x: x + 1
    block.forward = mine
    with replayed({block: torch.zeros(2)}):
        assert block(torch.ones(2)).tolist() == [0, 0]
    assert block.forward is mine


def test_an_ffn_without_layers_around_it():
    model = tiny_model("bert")
    site = find_sites(model)[0]
    assert block_of(site.owner, type(site)("", site.owner, site.spec)) is None
