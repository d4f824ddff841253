"""Sweeps: quality against direct computations, local figures against loops, controls, and a model left as it was."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from batches import text_batches
from tiny import tiny_model

from moefy_hf import MoEficationConfig, Sweep, allocate_budgets_, evaluate, fit_routers_, moefy_, profile
from moefy_hf.evaluation.controls import CONTROLS, control_router, routed_by
from moefy_hf.evaluation.local_figures import chunks_of, local_figures
from moefy_hf.evaluation.plots import allocation_words
from moefy_hf.measure.contexts import selecting
from moefy_hf.measure.metrics import is_causal, predictions
from moefy_hf.modeling.moefied import is_moefied
from moefy_hf.modeling.routed_activation import RoutedActivation

EXPERTS, SIZE = 6, 8
QUALITY = ("accuracy", "loss", "perplexity", "agreement", "kl")
HEADS = {
    "bert": ("AutoModelForSequenceClassification", "class"),
    "llama": ("AutoModelForCausalLM", "causal"),
    "t5": ("AutoModelForSeq2SeqLM", "seq2seq"),
}


def routed(name: str = "bert", head: str | None = None, layers=None, allocation="uniform", **changes):
    """(converted model, its dense self); routers are random, so that every selection errs."""
    model = tiny_model(name, head or HEADS[name][0], **changes)
    dense = copy.deepcopy(model)
    selection = {"type": "top_k", "k": 0.5, "allocation": allocation}
    moefy_(
        model,
        MoEficationConfig(expert_size=SIZE, splitter="random", router="random", selection=selection, layers=layers),
    )
    return model, dense


def data(name: str = "bert", count: int = 2, **kwargs) -> list[dict]:
    return text_batches(count, labels=HEADS[name][1], classes=2, **kwargs)


@torch.no_grad()
def flat_predictions(model, name: str, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, C) and labels (N,) at labelled positions, row by row."""
    logits, labels = [], []
    for batch in batches:
        output = model(**{key: value for key, value in batch.items() if key != "labels" or name == "t5"}).logits
        for row in range(len(output)):
            if name == "bert":
                logits.append(output[row])
                labels.append(batch["labels"][row])
                continue
            for position, label in enumerate(batch["labels"][row]):
                if label != -100 and (name == "t5" or position > 0):
                    logits.append(output[row, position - (name == "llama")])
                    labels.append(label)
    return torch.stack(logits), torch.stack(labels)


def figures_by_hand(logits: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    p, q = dense.double().softmax(-1), logits.double().softmax(-1)
    loss = -q[torch.arange(len(labels)), labels].log().mean().item()
    return {
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "loss": loss,
        "perplexity": math.exp(loss),
        "agreement": (logits.argmax(-1) == dense.argmax(-1)).double().mean().item(),
        "kl": (p * (p.log() - q.log())).sum(-1).mean().item(),
    }


@pytest.mark.parametrize("name", HEADS)
def test_quality_is_that_of_a_direct_computation(name):
    model, dense = routed(name)
    batches = data(name)
    sweep = evaluate(model, batches, [2, 1.0], controls=[], local_tokens=0, progress=False)
    expected, labels = flat_predictions(dense, name, batches)
    with selecting(model, k=2):
        logits, _ = flat_predictions(model, name, batches)
    first, half, full = sweep.rows
    assert (first["router"], half["router"], full["router"]) == ("dense", "own", "own")
    for row, found in ((first, expected), (half, logits), (full, expected)):
        by_hand = figures_by_hand(found, expected, labels)
        assert {key: row[key] for key in QUALITY} == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
    assert half["kl"] > 1e-4 and half["loss"] != pytest.approx(first["loss"], abs=1e-4)
    quality = "perplexity" if name == "llama" else "accuracy"
    assert sweep.facts["quality"] == quality and sweep.facts["positions"] == len(labels)
    if first[quality]:  # a random T5 answers nothing right
        assert half["relative_quality"] == pytest.approx(half[quality] / first[quality])
    else:
        assert "relative_quality" not in half and name == "t5"


def test_a_whole_selection_is_measured_as_it_is():
    """Also where nobody has measured what it spends; the model's own selection is another."""
    model, batches = routed()[0], data()
    whole = [{"type": "threshold", "tau": 0.3}, {"type": "top_k", "k": [1, 5]}]
    settings = {"controls": ["random"], "allocations": ["uniform"], "progress": False}
    sweep = evaluate(model, batches, [2], selections=["top_k", *whole], **settings)
    assert [row.get("type", "dense") for row in sweep.rows] == ["dense", "top_k", "top_k", "threshold", "top_k"]
    *_, threshold, each = sweep.rows
    assert threshold["tau"] == 0.3 and not {"k", "allocation"} & threshold.keys()
    assert (each["k"], each["allocation"], each["k_per_layer"]) == ([1, 5], "uniform", [1, 5])
    expected, labels = flat_predictions(model_at(model, k=EXPERTS), "bert", batches)
    for selection, row in zip(whole, (threshold, each), strict=True):
        logits, _ = flat_predictions(model_at(model, **selection), "bert", batches)
        by_hand = figures_by_hand(logits, expected, labels)
        assert {key: row[key] for key in QUALITY} == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
    assert 1 / EXPERTS < threshold["experts"] < 1
    assert threshold["experts"] == pytest.approx(sum(threshold["k_per_layer"]) / (2 * EXPERTS))
    assert "| threshold |  | " in sweep.table()


def model_at(model, **selection):
    other = copy.deepcopy(model)
    other.set_selection(**selection)
    return other


@pytest.mark.parametrize("name", HEADS)
def test_all_experts_are_exactly_dense(name):
    model, _ = routed(name)
    first, *rows = evaluate(model, data(name), [EXPERTS, 1.0], controls=CONTROLS, progress=False).rows
    assert len(rows) == 2 * (1 + len(CONTROLS))
    for row in rows:
        assert {key: row[key] for key in QUALITY} == {key: first[key] for key in QUALITY}
        assert (row["agreement"], row["kl"], row.get("relative_quality", 1)) == (1, 0, 1)
        assert (row["experts"], row["ffn_flops"], row["model_flops"]) == (1, 1, 1)
        assert row["output_error"] == 0 and row["captured_mass"] == pytest.approx(1, abs=1e-6)
        assert row["chunk_share"] == 1


def test_rows_say_what_they_are():
    model, _ = routed()
    sweep = evaluate(model, data(), [2, 0.5], controls=["oracle", "random"], progress=False)
    settings = [(row["router"], row["k"], row["allocation"], row["k_per_layer"]) for row in sweep.rows[1:]]
    assert settings == [
        (router, k, "uniform", [count, count])
        for router in ("own", "oracle", "random")
        for k, count in ((2, 2), (0.5, 3))
    ]
    assert [row["experts"] for row in sweep.rows[1:]] == [2 / 6, 3 / 6] * 3
    assert sweep.facts["router"] == "random" and sweep.facts["dtype"] == "float32"


def test_labels_of_minus_100_do_not_count():
    model, _ = routed("llama")
    batches = data("llama")
    for batch in batches:
        batch["labels"][:, 5:] = -100
    shorter = [{key: value[:, :5] for key, value in batch.items()} for batch in batches]
    for a, b in zip(
        evaluate(model, batches, [2], controls=[], local_tokens=0, progress=False).rows,
        evaluate(model, shorter, [2], controls=[], local_tokens=0, progress=False).rows,
        strict=True,
    ):
        assert {key: a[key] for key in QUALITY} == pytest.approx({key: b[key] for key in QUALITY}, rel=1e-5, abs=1e-7)


def test_without_labels_agreement_is_the_quality():
    model, _ = routed("llama")
    batches = text_batches()
    sweep = evaluate(model, batches, [2], controls=[], local_tokens=0, progress=False)
    assert sweep.facts["quality"] == "agreement"
    assert sweep.facts["positions"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert "accuracy" not in sweep.rows[0] and sweep.rows[0]["agreement"] == 1 > sweep.rows[1]["agreement"]


def test_token_labels_are_shifted_for_causal_models_only():
    batch = text_batches(1, labels="causal")[0]
    for name, head, causal in (
        ("bert", "AutoModelForMaskedLM", False),
        ("bert", "AutoModelForTokenClassification", False),
        ("bert", "AutoModelForCausalLM", True),
        ("gpt2", "AutoModelForCausalLM", True),
    ):
        changes = {"is_decoder": True} if (name, causal) == ("bert", True) else {}
        dense = tiny_model(name, head, num_labels=99, **changes)
        model = copy.deepcopy(dense)
        moefy_(model, MoEficationConfig(expert_size=SIZE, splitter="random", router="random"))
        for each in (dense, model):
            assert is_causal(each) is causal
        with selecting(model, k=1.0), torch.no_grad():
            logits, labels = predictions(model, batch)
            expected = dense(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        keep = batch["labels"] != -100
        if causal:
            keep[:, 0] = False
            expected = expected.roll(1, dims=1)
        assert torch.equal(labels, batch["labels"][keep])
        torch.testing.assert_close(logits, expected[keep], rtol=1e-4, atol=1e-5)


def test_question_answering_predicts_two_positions():
    model, dense = routed("bert", "AutoModelForQuestionAnswering")
    batches = text_batches(2)
    for batch in batches:
        batch |= {"start_positions": torch.tensor([0, 1, 2, 0]), "end_positions": torch.tensor([3, 3, 2, 1])}
    sweep = evaluate(model, batches, [2], controls=[], local_tokens=0, progress=False)
    with torch.no_grad():
        outputs = [dense(**batch) for batch in batches]
    losses = [float(output.loss) for output in outputs]
    right = sum(
        int((output[f"{end}_logits"].argmax(-1) == batch[f"{end}_positions"]).sum())
        for output, batch in zip(outputs, batches, strict=True)
        for end in ("start", "end")
    )
    assert sweep.facts["positions"] == 16 and sweep.rows[0]["accuracy"] == right / 16
    assert sweep.rows[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["bart", "mbart", "pegasus", "marian", "whisper"])
def test_decoders_of_encoder_decoders_take_labels_that_are_shifted_already(name):
    """As the model's own loss does."""
    model = tiny_model(name, "AutoModelForCausalLM", is_encoder_decoder=False)
    ids = torch.randint(3, 99, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.roll(-1, dims=1).masked_fill(torch.arange(6) == 5, -100)}
    with torch.no_grad():
        logits, labels = predictions(model, batch)
        assert is_causal(model) and len(labels) == 15
        assert float(F.cross_entropy(logits, labels)) == pytest.approx(float(model(**batch).loss), rel=1e-5)


@pytest.mark.parametrize(("num_labels", "labels"), [(1, torch.randn(4)), (1, None), (3, torch.ones(4, 3))])
def test_predictions_that_are_no_class_are_refused(num_labels, labels):
    model, _ = routed("bert", num_labels=num_labels)
    batches = [{**batch, "labels": labels} for batch in text_batches(1)]
    with pytest.raises(ValueError, match="one of several classes"):
        evaluate(model, batches, [2], controls=[], local_tokens=0, progress=False)
    with pytest.raises(ValueError, match="one of several classes"):
        allocate_budgets_(model, batches, progress=False)


# ---- local figures


@torch.no_grad()
def local_by_hand(model, batches, k: int, control: str | None) -> list[dict[str, float]]:
    """Token by token and expert by expert, on the inputs that the dense model gives each layer."""
    sums = [dict.fromkeys(("mass", "kept", "output", "dropped", "chunks", "union"), 0.0) for _ in model.moe_sites()]
    for batch in batches:
        with selecting(model, k=1.0, allocation="uniform"), profile(model, [batch], progress=False) as found:
            for site, stats, total in zip(model.moe_sites(), found.sites, sums, strict=True):
                chosen = []
                weights = site.weights()
                for x in stats.inputs:
                    neurons = weights.neurons(x)
                    blocks = [slice(e * SIZE, (e + 1) * SIZE) for e in range(EXPERTS)]
                    outputs = [weights.down[:, block] @ neurons[block] for block in blocks]
                    masses = [float(neurons[block].clamp_min(0).sum()) for block in blocks]
                    norms = [float(output.norm()) for output in outputs]
                    scores = {None: site.act.router(x).tolist(), "oracle": norms, "oracle_mass": masses}[control]
                    best = sorted(range(EXPERTS), key=lambda e, scores=scores: -scores[e])[:k]
                    chosen.append(set(best))
                    total["mass"] += sum(masses)
                    total["kept"] += sum(masses[e] for e in best)
                    total["output"] += float(sum(outputs).square().sum())
                    total["dropped"] += float(sum(outputs[e] for e in range(EXPERTS) if e not in best).square().sum())
                for length in batch["attention_mask"].sum(1).tolist():  # no chunk reaches into the next text
                    text, chosen = chosen[:length], chosen[length:]
                    for start in range(0, length - 7, 8):
                        total["chunks"] += EXPERTS
                        total["union"] += len(set().union(*text[start : start + 8]))
    return [
        {
            "captured_mass": total["kept"] / total["mass"],
            "output_error": total["dropped"] / total["output"],
            "chunk_share": total["union"] / total["chunks"],
        }
        for total in sums
    ]


def test_chunks_do_not_cross_texts():
    text = torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [5] * 7)
    assert chunks_of(text, 3).tolist() == [[0, 1, 2], [5, 6, 7], [10, 11, 12], [13, 14, 15]]
    assert chunks_of(text, 8).shape == (0, 8)


def test_without_long_texts_there_are_no_chunks():
    model, _ = routed()
    (row,) = evaluate(model, data(length=7), [2], controls=[], progress=False).rows[1:]
    assert "chunk_share" not in row and 0 < row["output_error"] < 1


@pytest.mark.parametrize("control", [None, "oracle", "oracle_mass"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_local_figures_are_those_of_loops(name, control):
    model, _ = routed(name, HEADS.get(name, HEADS["llama"])[0])
    batches = text_batches(2, rows=3)
    sweep = evaluate(model, batches, [2], controls=[control] if control else [], progress=False)
    row = sweep.rows[-1]
    expected = local_by_hand(model, batches, 2, control)
    for found, by_hand in zip(row["layers"], expected, strict=True):
        assert found == pytest.approx(by_hand, rel=1e-4)
    for key in expected[0]:
        assert row[key] == pytest.approx(sum(layer[key] for layer in expected) / len(expected), rel=1e-4)


def test_controls_bound_each_other():
    model, _ = routed("bert", hidden_act="relu")
    rows = evaluate(model, data(count=4, rows=16), [1, 2, 3], controls=CONTROLS, progress=False).rows[1:]
    by = {(row["router"], row["k"]): row for row in rows}
    for k in (1, 2, 3):
        for other in ("own", "oracle", "random"):  # top k by mass holds the most mass, token by token
            assert by["oracle_mass", k]["captured_mass"] >= by[other, k]["captured_mass"] - 1e-9
        assert by["oracle", k]["output_error"] < by["random", k]["output_error"]
        assert by["oracle", k]["captured_mass"] > by["random", k]["captured_mass"]
        assert by["random", k]["captured_mass"] == pytest.approx(k / EXPERTS, abs=0.04)
    for k in (1, 2):
        assert by["oracle", k + 1]["captured_mass"] > by["oracle", k]["captured_mass"]
    mean = {name: sum(by[name, k]["output_error"] for k in (1, 2, 3)) for name in ("oracle", "oracle_mass", "random")}
    assert mean["oracle"] <= mean["oracle_mass"] < mean["random"]
    assert by["oracle", 2]["kl"] < by["random", 2]["kl"]


def test_random_control_is_drawn_per_token_and_repeats():
    model, _ = routed()
    site = model.moe_sites()[0]
    router = control_router("random", site)
    scores = router(torch.ones(50, 16))
    assert len({tuple(row) for row in scores.argsort(-1).tolist()}) > 30
    a, b = (evaluate(model, data(), [2], controls=["random"], progress=False).rows[-1] for _ in range(2))
    assert a == b


def test_local_tokens_bound_the_work_and_zero_leaves_it_out():
    model, _ = routed()
    batches = data(count=6)  # 48 tokens a batch, padding included
    first = evaluate(model, batches[:2], [2], controls=[], local_tokens=60, progress=False).rows[1]
    more = evaluate(model, batches, [2], controls=[], local_tokens=60, progress=False).rows[1]
    assert more["layers"] == first["layers"]
    none = evaluate(model, batches, [2], controls=[], local_tokens=0, progress=False).rows[1]
    assert not {"layers", "output_error", "captured_mass", "chunk_share"} & set(none)


def test_local_figures_do_not_depend_on_padding():
    model, _ = routed()
    batches = data()
    wider = [
        {key: F.pad(value, (0, 8)) if key != "labels" else value for key, value in batch.items()} for batch in batches
    ]
    a, b = (evaluate(model, each, [2], controls=[], progress=False).rows[1]["layers"] for each in (batches, wider))
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-4)


def test_bfloat16():
    model, _ = routed()
    exact = evaluate(model, data(), [2], controls=["oracle"], progress=False).rows
    rough = evaluate(model.to(torch.bfloat16), data(), [2], controls=["oracle"], progress=False)
    assert rough.facts["dtype"] == "bfloat16"
    for a, b in zip(exact, rough.rows, strict=True):
        for key in {"captured_mass", "output_error", "chunk_share"} & set(a):
            assert a[key] == pytest.approx(b[key], abs=0.02)


# ---- allocations and parts of a model


def test_allocations_spend_the_same():
    model, _ = routed()
    allocate_budgets_(model, data(), 0.5, progress=False)
    sweep = evaluate(model, data(), [0.5], controls=[], allocations=["uniform", "sensitivity"], progress=False)
    uniform, sensitive = sweep.rows[1:]
    assert (uniform["allocation"], sensitive["allocation"]) == ("uniform", "sensitivity")
    assert uniform["experts"] == sensitive["experts"] == 0.5
    assert uniform["ffn_flops"] == sensitive["ffn_flops"]
    default = evaluate(model, data(), [0.5], controls=[], progress=False).rows[1]  # the model's own allocation
    assert default["allocation"] == "sensitivity" and default["k_per_layer"] == sensitive["k_per_layer"]


def test_settings_may_be_generators():
    model, _ = routed()
    allocate_budgets_(model, data(), 0.5, progress=False)
    sweep = evaluate(
        model,
        data(),
        (share for share in (1, 2)),
        controls=(name for name in ("oracle",)),
        allocations=(name for name in ("uniform", "sensitivity")),
        local_tokens=0,
        progress=False,
    )
    assert len(sweep.rows) == 1 + 2 * 2 * 2


def test_flops_of_rows():
    model, _ = routed("bert", layers=[1])
    rows = evaluate(model, data(), [2], controls=["oracle"], local_tokens=0, progress=False).rows
    dense, router = 2 * 2 * 16 * 48, 2 * 16 * EXPERTS
    assert rows[1]["ffn_flops"] == pytest.approx((dense + dense * 2 / 6 + router) / (2 * dense))
    assert rows[2]["ffn_flops"] == pytest.approx((dense + dense * 2 / 6) / (2 * dense))  # an oracle's cost is left out
    assert rows[1]["k_per_layer"] == [2] and rows[1]["experts"] == 2 / 6
    assert rows[1]["ffn_flops"] < rows[1]["model_flops"] < 1


# ---- what is refused, what is restored


class Counted(list):
    """Batches that count how often they are read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def state_of(model) -> dict:
    return {
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "selection": [site.act.selection for site in model.moe_sites()],
        "routers": [id(site.act.router) for site in model.moe_sites()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "weights": {key: value.clone() for key, value in model.state_dict().items()},
    }


def assert_same(before: dict, after: dict) -> None:
    weights, others = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controls": ["oracle", "orakel"]}, "orakel.*oracle, oracle_mass, random"),
        ({"allocations": ["uniform", "greedy"]}, "greedy.*uniform, sensitivity"),
        ({"allocations": ["sensitivity"]}, "allocate_budgets_"),
        ({"budgets": [2, 0]}, "k=0"),
        ({"budgets": [0.0]}, "0.0"),
        ({"budgets": [1.5]}, "1.5"),
        ({"budgets": [7]}, "1 to 6"),
        ({"budgets": ["all"]}, "all"),
        ({"selections": [{"type": "threshold"}]}, "takes either tau or a budget k"),
        ({"selections": [{"type": "threshold", "tau": 2.0}]}, "from 0 to 1, got 2.0"),
        ({"selections": [{"tau": 0.5}]}, "unknown selection None"),
    ],
)
def test_bad_settings_are_found_before_any_work(settings, message):
    model, _ = routed()
    batches, before = Counted(data()), state_of(model)
    batches_read = batches.reads
    with pytest.raises(ValueError, match=message):
        evaluate(model, batches, progress=False, **settings)
    assert batches.reads <= batches_read + 1  # `iter` is called once to tell lists from iterators
    assert_same(before, state_of(model))


def test_wrong_models_and_batches_are_refused():
    model, dense = routed()
    with pytest.raises(ValueError, match="not MoEfied"):
        evaluate(dense, data(), progress=False)
    with pytest.raises(ValueError, match="more than once"):
        evaluate(model, (batch for batch in data()), progress=False)
    with pytest.raises(ValueError, match="more than once"):
        evaluate(model, iter(data()), progress=False)
    with pytest.raises(ValueError, match="empty"):
        evaluate(model, [], progress=False)
    headless, _ = routed("bert", "AutoModel")
    with pytest.raises(ValueError, match="no logits"):
        evaluate(headless, text_batches(), progress=False)
    causal, _ = routed("llama")
    unlabelled = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in data("llama")]
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(causal, unlabelled, progress=False)


@pytest.mark.parametrize("training", [True, False])
def test_model_comes_back_as_it_was(training):
    model, _ = routed()
    model.config.problem_type = "single_label_classification"  # or BERT's first loss would write it
    model.set_selection(k=[1, 4])
    model.train(training)
    before = state_of(model)
    evaluate(model, data(), [2], controls=CONTROLS, progress=False)
    assert_same(before, state_of(model))


def test_model_comes_back_after_an_error():
    model, _ = routed()
    model.config.problem_type = "single_label_classification"
    model.train()
    before, batches = state_of(model), data()
    with pytest.raises(ValueError, match="embeddings of 99 tokens"):
        evaluate(model, [*batches, {"input_ids": torch.tensor([[1000]])}], [2], controls=CONTROLS, progress=False)
    assert_same(before, state_of(model))
    before = state_of(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        with routed_by(model, "oracle"), selecting(model, k=1, allocation="uniform"):
            assert all(type(site.act.router).__name__ == "OracleRouter" for site in model.moe_sites())
            raise RuntimeError("in the middle")
    assert_same(before, state_of(model))


def test_a_selection_without_allocation_stays_without():
    model, _ = routed()
    allocate_budgets_(model, data(), 0.5, progress=False)
    model.config.moefication["selection"] = {"type": "top_k", "k": 2}  # as a config written by hand
    model.set_selection()
    before = copy.deepcopy(model.config.moefication["selection"])
    with selecting(model, k=0.5, allocation="sensitivity"):
        pass
    assert model.config.moefication["selection"] == before
    assert [site.act.selection.k for site in model.moe_sites()] == [2, 2]


def test_dropout_is_off():
    model, _ = routed()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    a = evaluate(model, data(), [2], controls=["oracle"], progress=False).rows
    assert a == evaluate(model.train(), data(), [2], controls=["oracle"], progress=False).rows


def test_oracle_follows_the_weights_and_adds_no_parameters():
    model, _ = routed()
    keys = list(model.state_dict())
    with routed_by(model, "oracle"):
        assert set(model.state_dict()) == {key for key in keys if ".router." not in key}
        assert all(isinstance(site.act, RoutedActivation) for site in model.moe_sites())
    assert list(model.state_dict()) == keys


def test_local_figures_can_be_asked_directly():
    model, _ = routed()
    assert local_figures(model, data(), [], 100) == []


def test_a_model_whose_code_came_with_its_checkpoint(tmp_path):
    """Its class is that of the files beside the weights, not this package's."""
    model, _ = routed()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is not type(model) and is_moefied(loaded)
    for each in (model, loaded):
        allocate_budgets_(each, data(), 0.5, progress=False)
    settings = {"controls": CONTROLS, "allocations": ["uniform", "sensitivity"], "progress": False}
    ours, theirs = (evaluate(each, data(), [2], **settings) for each in (model, loaded))
    assert ours.facts == theirs.facts and ours.rows[1]["ffn_flops"] < 1
    assert ours.rows == theirs.rows
    with pytest.raises(ValueError, match="MoEfied already"):
        moefy_(loaded, MoEficationConfig(expert_size=SIZE, splitter="random", router="random"))
    with profile(model, data(), progress=False) as a, profile(loaded, data(), progress=False) as b:
        for site, x, y in zip(loaded.moe_sites(), a.sites, b.sites, strict=True):
            assert torch.equal(x.inputs, y.inputs)
            next(y.activations(site.weights()))
        fit_routers_(loaded, b, progress=False)


# ---- the result


def test_saved_and_loaded(tmp_path):
    model, _ = routed()
    sweep = evaluate(model, data(), [2], progress=False)
    sweep.save(tmp_path / "sweep.json")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    loaded = Sweep.load(tmp_path / "sweep.json")
    assert (loaded.rows, loaded.facts) == (sweep.rows, sweep.facts) and loaded.table() == sweep.table()
    sweep.save(str(tmp_path / "sweep.json"))  # over the old one, and by a plain string


def test_table():
    model, _ = routed()
    sweep = evaluate(model, data(), [2, 0.5], progress=False)
    head, rule, *lines = sweep.table().splitlines()
    assert len(lines) == len(sweep.rows) and len({line.count("|") for line in (head, rule, *lines)}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    at = {title: position for position, title in enumerate(cells[0])}
    assert cells[1][at["router"]] == "dense" and cells[1][at["output error"]] == ""
    assert [row[at["experts"]] for row in cells[2:4]] == ["33.3%", "50.0%"]
    for row, line in zip(sweep.rows[1:], cells[2:], strict=True):
        assert line[at["accuracy"]] == f"{row['accuracy']:.4g}"
        assert line[at["FFN FLOPs"]] == f"{row['ffn_flops']:.1%}"
    assert "captured mass" not in evaluate(model, data(), [2], local_tokens=0, progress=False).table()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    model, _ = routed()
    allocate_budgets_(model, data(), 0.5, progress=False)
    settings = {"controls": CONTROLS, "allocations": ["uniform", "sensitivity"], "local_tokens": 0}
    kinds = ["top_k", {"type": "level", "level": [0.5, 1.25]}]
    sweep = evaluate(model, data(count=1), [1, 2], selections=kinds, **settings, progress=False)
    assert (
        allocation_words(sweep.rows[1]) == "uniform budgets" and allocation_words(sweep.rows[-1]) == "level 0.5, 1.25"
    )
    for quality in ("accuracy", "perplexity"):
        sweep.facts["quality"] = quality
        sweep.plot(tmp_path / f"{quality}.png")
        content = (tmp_path / f"{quality}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 5_000
