"""Profiles: sums and samples against a computation without hooks; what is read, kept, restored and cleaned up."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_registry
import torch
import torch.nn.functional as F
from batches import real_count, text_batches
from tiny import tiny_model
from transformers.activations import ACT2FN

from moefy_hf import profile
from moefy_hf.measure.hooks import run_with_hooks
from moefy_hf.measure.profile import SiteProfile
from moefy_hf.measure.sample import TensorFile
from moefy_hf.modeling.ffn_sites import find_sites

SUMS = ("active", "mass", "total", "square")


@torch.no_grad()
def bert_by_hand(model, batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's FFN inputs (T, d) and neurons (T, f), text by text without padding: no mask, no hook."""
    layers = [([], []) for _ in model.encoder.layer]
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            hidden = model(ids[mask == 1][None], output_hidden_states=True).hidden_states
            for layer, before, (inputs, neurons) in zip(model.encoder.layer, hidden, layers, strict=False):
                x = layer.attention(before)[0][0]
                dense = layer.intermediate.dense
                inputs.append(x)
                neurons.append(ACT2FN[model.config.hidden_act](x @ dense.weight.T + dense.bias))
    return [(torch.cat(inputs), torch.cat(neurons)) for inputs, neurons in layers]


def sums_of(neurons: torch.Tensor) -> dict[str, torch.Tensor]:
    a = neurons.double()
    return {"active": (a > 0).sum(0).double(), "mass": a.abs().sum(0), "total": a.sum(0), "square": (a**2).sum(0)}


def assert_sums(stats: SiteProfile, neurons: torch.Tensor) -> None:
    assert stats.tokens == len(neurons)
    for name, expected in sums_of(neurons).items():
        assert getattr(stats, name).dtype == torch.float64
        torch.testing.assert_close(getattr(stats, name), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def bert():
    return tiny_model("bert")


@pytest.mark.parametrize("activation", ["gelu", "relu"])  # ReLU's zeros are not active
def test_sums_and_sample_are_those_of_the_real_tokens(activation):
    model, batches = tiny_model("bert", hidden_act=activation), text_batches()
    with profile(model, batches, progress=False) as found:
        assert found.tokens == real_count(batches) < sum(batch["input_ids"].numel() for batch in batches)
        for stats, (inputs, neurons) in zip(found.sites, bert_by_hand(model, batches), strict=True):
            assert_sums(stats, neurons)
            torch.testing.assert_close(stats.inputs, inputs, rtol=1e-5, atol=1e-5)  # and in this order
            assert stats.sparsity == pytest.approx(float((neurons <= 0).double().mean()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "t5-gated"])
def test_sample_gives_the_neurons_back(name, monkeypatch):
    """Recomputed from the sample in chunks, also in gated, fused and Conv1D layouts."""
    monkeypatch.setattr("moefy_hf.measure.sample.CHUNK", 5)
    head = "AutoModelForSeq2SeqLM" if name.startswith("t5") else "AutoModel"
    model = tiny_model(name, head)
    batches = text_batches(2, labels="seq2seq" if name.startswith("t5") else None)
    with profile(model, batches, progress=False) as found:
        for site, stats in zip(find_sites(model), found.sites, strict=True):
            chunks = list(stats.activations(site.weights()))
            assert [len(x) for x, _ in chunks[:-1]] == [5] * (len(chunks) - 1)
            assert torch.equal(torch.cat([x for x, _ in chunks]), stats.inputs)
            assert_sums(stats, torch.cat([neurons for _, neurons in chunks]))


def test_does_not_depend_on_padding_or_on_batches(bert):
    batches = text_batches(3)
    wider = [{key: F.pad(value, (0, 9)) for key, value in batch.items()} for batch in batches]
    single = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in range(4)]
    with profile(bert, batches, progress=False) as found:
        for other_batches in (wider, single):
            with profile(bert, other_batches, progress=False) as other:
                for a, b in zip(found.sites, other.sites, strict=True):
                    torch.testing.assert_close(a.inputs, b.inputs, rtol=1e-5, atol=1e-5)
                    for name in SUMS:
                        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-4)


def test_max_tokens_is_exact_and_reading_stops_there(bert):
    batches = text_batches(6)
    read = []

    def counted():
        for batch in batches:
            read.append(batch)
            yield batch

    limit = real_count(batches[:2]) + 3
    with profile(bert, counted(), max_tokens=limit, progress=False) as found:
        assert len(read) == 3
        for stats, (inputs, neurons) in zip(found.sites, bert_by_hand(bert, batches[:3]), strict=True):
            assert_sums(stats, neurons[:limit])
            assert stats.inputs.shape == (limit, 16)
            torch.testing.assert_close(stats.inputs, inputs[:limit], rtol=1e-5, atol=1e-5)


def test_max_tokens_reached_at_the_end_of_a_batch(bert):
    batches = text_batches(4)
    with profile(bert, batches, max_tokens=real_count(batches[:2]), progress=False) as found:
        assert [stats.tokens for stats in found.sites] == [real_count(batches[:2])] * 2


def test_encoder_and_decoder_have_their_own_padding():
    model = tiny_model("t5", "AutoModelForSeq2SeqLM")
    batches = text_batches(3, labels="seq2seq")
    source, target = real_count(batches), sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert source != target
    with profile(model, batches, progress=False) as found:
        assert [stats.tokens for stats in found.sites] == [source, source, target, target]
        single = [
            {
                "input_ids": batch["input_ids"][row, batch["attention_mask"][row] == 1][None],
                "labels": batch["labels"][row, batch["labels"][row] != -100][None],
            }
            for batch in batches
            for row in range(4)
        ]
        with profile(model, single, progress=False) as alone:  # without any padding
            for a, b in zip(found.sites, alone.sites, strict=True):
                torch.testing.assert_close(a.inputs, b.inputs, rtol=1e-4, atol=1e-5)


def test_decoder_attention_mask_wins_over_labels():
    model = tiny_model("bart", "AutoModelForSeq2SeqLM")
    batch = text_batches(1, labels="seq2seq")[0]
    batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    batch["decoder_attention_mask"][:, -1] = 0
    with profile(model, [batch], progress=False) as found:
        assert [stats.tokens for stats in found.sites] == [int(batch["attention_mask"].sum())] * 2 + [4 * 11] * 2


def test_images_have_no_padding():
    with profile(tiny_model("vit"), [{"pixel_values": torch.randn(3, 3, 8, 8)}], progress=False) as found:
        assert found.tokens == 3 * (4 + 1)


def test_only_some_layers(bert):
    batches = text_batches(2)
    with profile(bert, batches, progress=False) as every, profile(bert, batches, layers=[1], progress=False) as one:
        assert len(one.sites) == 1
        assert torch.equal(one.sites[0].inputs, every.sites[1].inputs)
        assert torch.equal(one.sites[0].mass, every.sites[1].mass)


def test_sample_lives_in_a_file_until_closed(bert):
    with profile(bert, text_batches(2), max_tokens=5_000, progress=False) as found:
        folder = Path(found.directory.name)
        for position, stats in enumerate(found.sites):
            path = folder / f"{position}.bin"
            on_disk = np.fromfile(path, dtype=np.float32).reshape(-1, 16)
            assert on_disk.shape == (stats.tokens, 16) and np.array_equal(on_disk, stats.inputs.numpy())
            stats.inputs[0, 0] = 42  # the tensor is the file, no copy of it
            assert np.fromfile(path, dtype=np.float32)[0] == 42
    assert not folder.exists()
    assert all(stats.inputs is None for stats in found.sites)
    assert found.sites[0].mass.sum() > 0  # sums outlive the sample
    with pytest.raises(ValueError, match="kept no sample"):
        next(found.sites[0].activations(find_sites(bert)[0].weights()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_an_error(bert, monkeypatch):
    class Full(TensorFile):
        def __init__(self, path):
            super().__init__(Path("/dev/full"))

    monkeypatch.setattr("moefy_hf.measure.profile.TensorFile", Full)
    hooks = hooks_of(bert)
    with pytest.raises(OSError, match="No space left.*TMPDIR"):
        profile(bert, text_batches(2), progress=False)
    assert hooks_of(bert) == hooks


def test_first_batches_are_kept_for_what_needs_whole_texts(bert, monkeypatch):
    batches = text_batches(5)
    monkeypatch.setattr("moefy_hf.measure.rounds.KEPT_TOKENS", real_count(batches[:2]) + 1)
    with profile(bert, batches, progress=False) as found:
        assert len(found.batches) == 3 and all(a is b for a, b in zip(found.batches, batches, strict=False))


def test_image_batches_count_by_their_patches(monkeypatch):
    monkeypatch.setattr("moefy_hf.measure.rounds.KEPT_TOKENS", 7)
    batches = [{"pixel_values": torch.randn(1, 3, 8, 8)}] * 4  # five tokens each
    with profile(tiny_model("vit"), batches, progress=False) as found:
        assert len(found.batches) == 2


def test_without_a_sample_nothing_is_written(bert):
    found = profile(bert, text_batches(1), sample=False, progress=False)
    assert found.directory is None and all(stats.inputs is None for stats in found.sites)
    assert found.tokens == real_count(text_batches(1))
    found.close()


def test_sample_keeps_the_dtype():
    model = tiny_model("bert").to(torch.bfloat16)
    with profile(model, text_batches(1), progress=False) as found:
        assert found.sites[0].inputs.dtype == torch.bfloat16
        assert found.sites[0].mass.dtype == torch.float64
        _, neurons = next(found.sites[0].activations(find_sites(model)[0].weights()))
        assert_sums(found.sites[0], neurons.float())


def hooks_of(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_hooks_and_training_mode_are_restored(training):
    model = tiny_model("bert").train(training)
    before = hooks_of(model)
    with profile(model, text_batches(1), progress=False):
        assert model.training is training and hooks_of(model) == before
    with pytest.raises(ValueError, match="embeddings of 99 tokens"):
        profile(model, [*text_batches(1), {"input_ids": torch.tensor([[10_000]])}], progress=False)
    assert model.training is training and all(module.training is training for module in model.modules())
    assert hooks_of(model) == before and torch.is_grad_enabled()


def test_dropout_is_off():
    model = tiny_model("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with profile(model, text_batches(1), progress=False) as a, profile(model, text_batches(1), progress=False) as b:
        assert torch.equal(a.sites[1].inputs, b.sites[1].inputs)


def test_gradients_stay_on_for_readers_of_activations(bert):
    weights = find_sites(bert)[0].weights()
    with profile(bert, text_batches(1), progress=False) as found:
        for _, neurons in found.sites[0].activations(weights):
            assert torch.is_grad_enabled() and not neurons.requires_grad


def test_observed_shows_layers_in_order(bert):
    batch, positions = text_batches(1)[0], []

    def seen(position, x, neurons, text):
        positions.append((position, len(x), len(neurons), text.bincount().tolist()))

    with run_with_hooks(bert, find_sites(bert), seen) as run:
        run(batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert positions == [(i, sum(lengths), sum(lengths), lengths) for i in range(2)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bart", "gptj"])
def test_a_language_models_head_is_not_run(name):
    """It sees what it sees with its head, labels or not."""
    model, batches = tiny_model(name, "AutoModelForCausalLM"), text_batches(2, labels="causal")
    heads = []
    model.get_output_embeddings().register_forward_hook(lambda *args: heads.append(1))
    expected = []
    for site in find_sites(model):
        site.first.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    with torch.no_grad():
        model(**batches[0])
    mask, heads[:] = batches[0]["attention_mask"].bool(), []
    first = expected[: len(find_sites(model))]
    with profile(model, batches, progress=False) as found:
        for stats, x in zip(found.sites, first, strict=True):
            torch.testing.assert_close(
                stats.inputs[: int(mask.sum())], x.unflatten(0, (-1, 12))[mask] if x.dim() == 2 else x[mask]
            )
    assert not heads


@pytest.mark.parametrize(
    "batches", [[], [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3)}]]
)
def test_empty_calibration_is_refused(bert, batches):
    with pytest.raises(ValueError, match="calibration is empty"):
        profile(bert, batches, progress=False)


@pytest.mark.parametrize("batch", [[torch.ones(1, 3).long()], torch.ones(1, 3).long(), {"input_ids": [[1, 2]]}])
def test_a_batch_must_be_a_mapping_of_tensors(bert, batch):
    with pytest.raises((TypeError, ValueError), match="mappings of tensors"):
        profile(bert, [batch], progress=False)


@pytest.mark.parametrize("layers", [[], [2], [-1], [0, True]])
def test_layers_out_of_range_are_refused(bert, layers):
    with pytest.raises(ValueError, match="from 0 to 1"):
        profile(bert, text_batches(1), layers=layers, progress=False)


@pytest.mark.parametrize("model_type", ["xlnet", "bert"])
def test_padding_is_left_out_whichever_comes_first_of_rows_and_tokens(model_type):
    """XLNet's FFNs see (tokens, rows); what they see of real tokens is the same with more padding."""
    model = tiny_registry.tiny_model(model_type)
    ids = torch.arange(5, 13).reshape(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    more = {"input_ids": torch.nn.functional.pad(ids, (0, 2)), "attention_mask": torch.nn.functional.pad(mask, (0, 2))}
    for batch in ({"input_ids": ids, "attention_mask": mask}, more):
        rows: list[torch.Tensor] = []
        see = partial(lambda rows, i, x, neurons, text: rows.append(text), rows)
        with run_with_hooks(model, find_sites(model), see) as run_batch:
            run_batch(batch)
        assert [sorted(text.tolist()) for text in rows] == [[0, 0, 0, 0, 1, 1, 1]] * len(find_sites(model))
