"""Planted structure is found, noise is not."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, hypergeom

from moefy_hf.analysis.significance import (
    FEWEST_TEXTS,
    alignment,
    class_excess,
    correlations,
    entropy,
    explained_variance,
    false_discoveries,
    shared_function,
    token_excess,
    upper_tail,
)

CLASSES = np.repeat(np.arange(8), [400, 250, 150, 80, 50, 40, 20, 10])  # as uneven as real topics


def shares(generator, experts=48):
    """(N, E): shares of use of texts of various lengths; loads from rare to always, and texts that differ."""
    loads = np.geomspace(0.002, 0.95, experts)
    lengths = generator.integers(4, 60, len(CLASSES))
    own = generator.beta(loads * 2, (1 - loads) * 2, (len(CLASSES), experts))  # a text's tokens go together
    return generator.binomial(lengths[:, None], own) / lengths[:, None]


def sums(values, labels):
    totals = np.stack([values[labels == c].sum(0) for c in range(labels.max() + 1)])
    return totals, np.bincount(labels), np.stack([values.sum(0), (values**2).sum(0), (values**3).sum(0)])


def test_noise_has_no_function():
    """Forty models in which nothing depends on the class: hardly ever is anything said to."""
    generator, found = np.random.default_rng(0), []
    for _ in range(40):
        _, p = class_excess(*sums(shares(generator), generator.permutation(CLASSES)))
        found.append(false_discoveries(p).sum())
    assert np.count_nonzero(found) <= 5 and np.mean(found) < 0.3  # of 384 hypotheses


def test_p_values_of_noise_are_uniform_in_the_tail():
    generator, p = np.random.default_rng(1), []
    for _ in range(60):
        p.append(class_excess(*sums(shares(generator), generator.permutation(CLASSES)))[1].ravel())
    p = np.concatenate(p)
    for level in (0.05, 0.01, 0.001):
        assert np.mean(p < level) < 1.35 * level
    assert np.mean(p < 0.05) > 0.03


def test_planted_classes_are_found():
    generator = np.random.default_rng(2)
    values, labels = shares(generator), generator.permutation(CLASSES)
    planted = {(1, 20), (4, 30), (3, 25)}
    for label, expert in planted:
        values[labels == label, expert] = np.minimum(values[labels == label, expert] * 3 + 0.1, 1)
    times, p = class_excess(*sums(values, labels))
    found = {tuple(map(int, pair)) for pair in np.argwhere(false_discoveries(p))}
    assert planted <= found and len(found - planted) <= 1
    assert times[4, 30] == pytest.approx(values[labels == 4, 30].mean() / values[:, 30].mean())


def test_small_classes_and_constant_experts_are_not_tested():
    generator = np.random.default_rng(3)
    values, labels = shares(generator), CLASSES.copy()
    values[:, 5] = 0.25
    labels[-1] = 0
    p = class_excess(*sums(values, labels))[1]
    assert (np.bincount(labels)[7] == FEWEST_TEXTS - 1) and np.isnan(p[7]).all() and np.isnan(p[:, 5]).all()
    assert np.isfinite(p[:7, 10:]).all()


def test_an_expert_that_few_texts_use_is_not_tested():
    values = np.zeros((1000, 2))
    values[: FEWEST_TEXTS - 1, 0] = values[:FEWEST_TEXTS, 1] = 0.5
    p = class_excess(*sums(values, CLASSES[:1000]))[1]
    assert np.isnan(p[:, 0]).all() and np.isfinite(p[0, 1])


@pytest.mark.parametrize("drawn, ones, texts", [(30, 40, 500), (12, 20, 1000), (300, 30, 600), (400, 100, 1000)])
def test_the_tail_is_that_of_the_permutations(drawn, ones, texts):
    """Shares of 0 and 1: the permutation distribution is hypergeometric, and known."""
    values, labels = np.zeros((texts, 1)), np.arange(texts) >= drawn
    values[:ones] = 1
    for seen in range(1, min(drawn, ones) + 1):
        values[:] = 0
        values[:seen] = 1
        values[drawn : drawn + ones - seen] = 1
        p = class_excess(*sums(values, labels.astype(int)))[1][0, 0]
        exact = hypergeom.sf(seen - 1, texts, ones, drawn)
        if exact < 0.1:
            assert p > 0.4 * exact  # a continuous distribution leaves out about half of the point itself
        if 1e-3 < exact < 0.1:
            assert p < 1.1 * exact


def token_sums(keep, tokens, text, slots):
    """keep (T, E), tokens (T,), text (T,): as `SlotSums` has them, by loops."""
    found = np.zeros((4, slots, keep.shape[1]))
    texts = np.zeros(slots)
    for each in np.unique(text):
        mine = text == each
        p = keep[mine].mean(0)
        for slot in np.unique(tokens[mine]):
            found[:, slot] += [keep[mine & (tokens == slot)].mean(0), p, p * (1 - p), p * (1 - p) * (1 - 2 * p)]
            texts[slot] += 1
    return (*found, texts)


def clustered(generator, texts=250, length=24, slots=30, experts=12):
    """Texts with words of their own and experts of their own: words and experts go together, but only by text."""
    text = np.repeat(np.arange(texts), length)
    topic = generator.integers(0, 5, texts)
    tokens = (generator.integers(0, slots, len(text)) + 6 * topic[text] * generator.integers(0, 2, len(text))) % slots
    rates = generator.uniform(0.02, 0.9, (5, experts))
    keep = (generator.random((len(text), experts)) < rates[topic[text]]).astype(float)
    return keep, tokens, text


def test_words_that_merely_share_a_topic_with_an_expert_are_not_found():
    generator, found = np.random.default_rng(4), []
    for _ in range(8):
        _, p = token_excess(*token_sums(*clustered(generator), 30))
        found.append(false_discoveries(p).sum())
    assert sum(found) <= 2  # of 2,880 hypotheses


def test_a_word_that_an_expert_responds_to_is_found():
    keep, tokens, text = clustered(np.random.default_rng(5))
    keep[tokens == 7, 3] = 1
    times, p = token_excess(*token_sums(keep, tokens, text, 30))
    assert np.argwhere(false_discoveries(p)).tolist() == [[7, 3]] and times[7, 3] > 1.05


def test_repetitions_within_a_text_are_no_evidence():
    """A word in nine texts is not tested, however often it is there."""
    text = np.repeat(np.arange(9), 100)
    tokens = np.arange(900) % 2
    p = token_excess(*token_sums((tokens == 1)[:, None].astype(float), tokens, text, 2))[1]
    assert np.isnan(p).all()


def test_false_discoveries_are_those_of_benjamini_and_hochberg():
    p = np.random.default_rng(6).beta(0.3, 1, (20, 30))
    assert np.array_equal(false_discoveries(p, 0.1), false_discovery_control(p.ravel()).reshape(p.shape) <= 0.1)
    holed = p.copy()
    holed[3] = np.nan
    rest = np.delete(p, 3, 0)
    assert np.array_equal(np.delete(false_discoveries(holed), 3, 0), false_discoveries(rest))
    assert not false_discoveries(np.full(4, np.nan)).any() and not false_discoveries(np.ones(5)).any()


def test_nothing_is_tested_where_nothing_varies():
    assert np.isnan(upper_tail(np.zeros(2), np.zeros(2), np.zeros(2))).all()


def test_variance_that_classes_explain():
    generator = np.random.default_rng(7)
    noise = [
        np.nanmean(explained_variance(*sums(shares(generator), generator.permutation(CLASSES)))) for _ in range(20)
    ]
    assert abs(np.mean(noise)) < 0.002  # the plain ratio would give 0.007
    values = np.stack([CLASSES == 2, CLASSES % 2, np.ones(len(CLASSES))], 1).astype(float)
    explained = explained_variance(*sums(values, CLASSES))
    assert explained[:2] == pytest.approx(1) and np.isnan(explained[2])


def test_neurons_of_an_expert_that_share_a_profile():
    generator, experts, counts = np.random.default_rng(10), np.arange(96) // 8, np.array([40, 30, 20, 10, 0])
    profiles = generator.normal(size=(5, 12))[:, experts]
    assert shared_function(profiles * counts[:, None], counts, experts) == pytest.approx(1)
    noisy = (profiles + generator.normal(size=profiles.shape)) * counts[:, None]
    assert 0.2 < shared_function(noisy, counts, experts) < 0.8
    by_chance = [shared_function(noisy, counts, generator.permutation(experts)) for _ in range(50)]
    assert abs(np.mean(by_chance)) < 0.02


def test_entropy_of_loads():
    assert entropy(np.full(48, 3.0)) == pytest.approx(1) and entropy(np.eye(48)[5]) == 0
    assert entropy(np.array([1.0, 1, 0, 0])) == pytest.approx(0.5)


def test_correlations_are_pearson():
    use = np.random.default_rng(8).random((500, 6)) < np.linspace(0.1, 0.9, 6)
    use[:, 3] = use[:, 2] | use[:, 1]
    use[:, 5] = True
    a = use.astype(float)
    found = correlations(a.T @ a, a.sum(0), a.sum(0), 500)
    assert found[:5, :5] == pytest.approx(np.corrcoef(a[:, :5].T)) and (found[5] == 0).all()


def test_alignment_sees_rotations_and_nothing_in_noise():
    generator = np.random.default_rng(9)
    x, y = generator.normal(size=(2, 4000, 8))
    turn = np.linalg.qr(generator.normal(size=(8, 8)))[0]

    def aligned(a, b):
        return alignment(a.T @ b, a.T @ a, b.T @ b)

    assert aligned(x, 3 * x @ turn) == pytest.approx(1) and aligned(x, y) < 0.05
