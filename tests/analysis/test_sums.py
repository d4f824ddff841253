"""Streaming sums equal what loops over texts find, in one piece or several, and do not grow."""

import pytest
import torch

from moefy_hf.analysis.measuring import Shuffled, expert_norms, grams, largest
from moefy_hf.analysis.sums import EXAMPLES, ClassSums, Examples, Groups, SlotSums, TextBatch, UseSums
from moefy_hf.modeling.router_base import output_norm

SLOTS, CLASSES, EXPERTS, LENGTH = 5, 3, 4, 9


def text_batch(rows: int = 6, seed: int = 0) -> tuple[TextBatch, torch.Tensor]:
    """Texts of 1 to 9 tokens with ids 10, 11, ...; and which experts tokens use (T, E)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH + 1, (rows,), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    ids = torch.randint(10, 10 + SLOTS + 1, (rows, LENGTH), generator=generator) * mask
    text, place = mask.nonzero(as_tuple=True)
    slot = ids[text, place] - 10
    slot[slot == SLOTS] = -1  # a token that is not tested
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    batch = TextBatch(
        text,
        place,
        lengths,
        ids,
        ids[text, place] != 10,
        {"token": Groups.of(text, slot, SLOTS)},
        {"class": labels},
    )
    return batch, (torch.rand(len(text), EXPERTS, generator=generator) < 0.4).float()


def test_slot_sums_are_those_of_loops():
    sums, expected, texts = SlotSums(SLOTS, EXPERTS), torch.zeros(4, SLOTS, EXPERTS), torch.zeros(SLOTS)
    for seed in range(3):  # three batches
        batch, keep = text_batch(seed=seed)
        sums.update_(keep, batch.shares(keep), batch.groups["token"])
        for row in range(len(batch.lengths)):
            mine = batch.text == row
            p = keep[mine].mean(0)
            for slot in range(SLOTS):
                those = mine & (batch.ids[batch.text, batch.place] == 10 + slot)
                if those.any():
                    use = keep[those].mean(0)
                    expected[:, slot] += torch.stack([use, p, p * (1 - p), p * (1 - p) * (1 - 2 * p)])
                    texts[slot] += 1
    assert torch.allclose(sums.sums.float(), expected, atol=1e-5) and torch.equal(sums.texts.float(), texts)


def test_use_and_class_sums_are_those_of_loops():
    use = UseSums(EXPERTS, {"token": SLOTS}, {"class": CLASSES})
    shares, labels, all_keep = [], [], []
    for seed in range(3):
        batch, keep = text_batch(seed=seed)
        use.update_(keep, batch)
        shares += [keep[batch.text == row].mean(0) for row in range(len(batch.lengths))]
        labels.append(batch.labels["class"])
        all_keep.append(keep)
    values, kept, given = torch.stack(shares).double(), torch.cat(all_keep).double(), torch.cat(labels)
    sums = use.classes["class"]
    for each in range(CLASSES):
        assert torch.allclose(sums.totals[each], values[given == each].sum(0), atol=1e-5)
        assert sums.counts[each] == (given == each).sum()
    assert torch.allclose(sums.moments, torch.stack([(values**power).sum(0) for power in (1, 2, 3)]), atol=1e-5)
    assert torch.allclose(use.pairs, kept.t() @ kept) and use.load == pytest.approx(kept.sum(0).numpy())
    assert torch.tensor(use.covariance()) == pytest.approx(torch.cov(kept.t(), correction=0))


def test_examples_are_the_texts_with_the_largest_outputs():
    examples, best = Examples(EXPERTS, LENGTH), []
    for seed in range(4):
        batch, keep = text_batch(seed=seed)
        norms = torch.rand(keep.shape, generator=torch.Generator().manual_seed(100 + seed))
        examples.update_(keep, norms, batch)
        for row in range(len(batch.lengths)):
            mine = batch.text == row
            for expert in range(EXPERTS):
                counted = norms[mine & batch.plain & (keep[:, expert] > 0), expert]
                if len(counted):
                    ids = batch.ids[row, : batch.lengths[row]].tolist()
                    best.append((expert, float(counted.max()), ids, (keep[mine, expert] > 0).tolist()))
    for expert in range(EXPERTS):
        expected = sorted((found[1:] for found in best if found[0] == expert), reverse=True)[:EXAMPLES]
        order = examples.value[expert].argsort(descending=True)
        for place, (value, ids, fired) in zip(order.tolist(), expected, strict=True):
            assert examples.value[expert, place] == pytest.approx(value)
            assert examples.ids[expert, place, : len(ids)].tolist() == ids
            assert (examples.ids[expert, place, len(ids) :] == -1).all()
            assert examples.fired[expert, place, : len(ids)].tolist() == fired


def test_norms_are_those_of_the_experts_outputs():
    generator = torch.Generator().manual_seed(0)
    neurons, down = torch.randn(7, 12, generator=generator), torch.randn(5, 12, generator=generator)
    expected = output_norm(neurons.unflatten(-1, (3, 4)), down.unflatten(-1, (3, 4)))
    assert torch.allclose(expert_norms(neurons, grams(down, 3)), expected, atol=1e-5)


def test_as_many_are_chosen_as_each_token_has():
    norms, counts = torch.tensor([[3.0, 1, 2], [1, 3, 2], [1, 2, 3]]), torch.tensor([1, 2, 0])
    assert largest(norms, counts).tolist() == [[True, False, False], [False, True, True], [False] * 3]


def test_shuffled_labels_are_the_same_labels_in_another_order():
    counts = torch.tensor([50, 0, 30, 20])
    shuffled = Shuffled(counts, seed=3)
    drawn = torch.cat([shuffled.draw(each) for each in (40, 1, 59)])
    assert torch.equal(torch.bincount(drawn, minlength=4), counts)
    assert not torch.equal(drawn, drawn.sort().values)


def test_class_sums_hold_for_classes_without_texts():
    sums = ClassSums(CLASSES, EXPERTS)
    sums.update_(torch.ones(2, EXPERTS), torch.tensor([2, 2]))
    assert sums.counts.tolist() == [0, 0, 2] and sums.totals[2].tolist() == [2.0] * EXPERTS
