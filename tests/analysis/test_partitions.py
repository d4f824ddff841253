"""Partitions are compared by their neurons, wherever a conversion has put them."""

import numpy as np
import pytest
import torch
from tiny import convert, tiny_model

from moefy_hf.analysis import compare_partitions
from moefy_hf.analysis.partitions import agreement, matched
from moefy_hf.conversion.permute import permute_neurons_


def moe(**settings):
    model = tiny_model("bert")
    convert(model, **settings)
    return model


def test_the_same_partition_in_another_order():
    one, other = moe(), moe()
    generator = torch.Generator().manual_seed(0)
    for site in other.moe_sites():  # experts in another order, and neurons within experts
        blocks = torch.arange(48).view(6, 8)[torch.randperm(6, generator=generator)]
        inner = torch.stack([block[torch.randperm(8, generator=generator)] for block in blocks])
        permute_neurons_(site, inner.flatten())
    for row in compare_partitions(one, other):
        assert row["agreement"] == 1 and row["matched_cosine"] == pytest.approx(1, abs=1e-5)
        assert abs(row["random"]) < 0.15


def test_another_seed_is_another_partition():
    for row in compare_partitions(moe(seed=0), moe(seed=1)):
        assert abs(row["agreement"]) < 0.15 and row["matched_cosine"] == pytest.approx(1, abs=1e-5)


def test_rows_are_matched():
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    to, cosine = matched(rows, rows[order] + 0.01)
    assert np.array_equal(order.numpy()[to], np.arange(20)) and cosine > 0.99


def test_agreement_by_chance_is_none():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(48), 32)
    by_chance = [agreement(labels, generator.permutation(labels)) for _ in range(20)]
    assert abs(np.mean(by_chance)) < 0.002 and agreement(labels, (labels + 7) % 48) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="is not MoEfied"):
        compare_partitions(moe(), tiny_model("bert"))
    with pytest.raises(ValueError, match="different numbers or sizes"):
        compare_partitions(moe(), moe(layers=[0]))
