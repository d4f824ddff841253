"""ReLU-fication in modules and config; penalties against formulas; the callback really adds its penalty to losses."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from batches import text_batches
from tiny import NAMES, distance, run, tiny_inputs, tiny_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.activations import ACT2FN

from moefy_hf import MoEficationConfig, SparsityPenaltyCallback, moefy_, profile, relufy_
from moefy_hf.discovery.towers import tower_of
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.training.sparsity import PENALTIES

sys.path.append(str(Path(__file__).parent / "registry"))
from tiny_registry import tiny_model as registry_model  # noqa: E402

# ---- relufy_

CASES = {name: "AutoModel" for name in NAMES if not name.startswith("clip")}


@pytest.mark.parametrize("name", CASES)
def test_relufy_swaps_every_ffn_and_survives_saving(name, tmp_path):
    model, inputs = tiny_model(name), tiny_inputs(name)
    before, was_relu = run(model, inputs), all(isinstance(site.act, nn.ReLU) for site in find_sites(model))
    assert relufy_(model) is model
    assert all(isinstance(site.act, nn.ReLU) for site in find_sites(model))
    after = run(model, inputs)
    assert (distance(after, before) < 1e-6) is was_relu
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert all(isinstance(site.act, nn.ReLU) for site in find_sites(loaded))
    assert distance(run(loaded, inputs), after) < 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_new", "relu2", "gelu"])
@pytest.mark.parametrize("name", ["bert", "t5", "t5-gated", "gpt2", "llama"])
def test_other_activations_survive_saving_too(name, activation, tmp_path):
    model, inputs = relufy_(tiny_model(name), activation), tiny_inputs(name)
    assert all(type(site.act) is type(ACT2FN[activation]) for site in find_sites(model))
    model.save_pretrained(tmp_path)
    assert distance(run(type(model).from_pretrained(tmp_path).eval(), inputs), run(model, inputs)) < 1e-6


@pytest.mark.parametrize("name", ["bert", "distilbert", "electra", "roberta", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("head", ["AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
def test_heads_are_the_same_after_saving(name, head, tmp_path):
    """Some heads take their activation from the same field of the config as the FFNs do."""
    model, inputs = relufy_(tiny_model(name, head)), tiny_inputs(name)
    model.save_pretrained(tmp_path)
    assert distance(run(type(model).from_pretrained(tmp_path).eval(), inputs), run(model, inputs)) < 1e-6


def test_gated_t5_stays_gated():
    model = relufy_(tiny_model("t5-gated"))
    assert model.config.feed_forward_proj == "gated-relu"
    assert relufy_(tiny_model("t5")).config.feed_forward_proj == "relu"
    with profile(model, [tiny_inputs("t5-gated")], progress=False) as found:
        site = find_sites(model)[0]
        x, neurons = next(found.sites[0].activations(site.weights()))
        expected = (x @ site.gate.weight.T).relu() * (x @ site.up.weight.T)
        torch.testing.assert_close(neurons, expected.detach())


def test_a_relufied_model_converts_and_is_sparse():
    model = relufy_(tiny_model("bert", "AutoModelForSequenceClassification"))
    config = MoEficationConfig(expert_size=8, splitter="random")
    report = moefy_(model, config, text_batches(8), progress=False)
    assert all(0.2 < sparsity < 0.8 for sparsity in report.sparsity)


def test_of_a_composite_model_the_text_tower_is_relufied():
    model = relufy_(tiny_model("clip"))
    acts = {tower_of(model, site.name): type(site.act).__name__ for site in find_sites(model, "all")}
    assert acts == {"text": "ReLU", "vision": "QuickGELUActivation"}
    assert (model.config.text_config.hidden_act, model.config.vision_config.hidden_act) == ("relu", "quick_gelu")


def test_relufy_refuses():
    with pytest.raises(ValueError, match="unknown activation 'rely'.*relu"):
        relufy_(tiny_model("bert"), "rely")
    with pytest.raises(ValueError, match="does not name its FFN activation"):
        relufy_(registry_model("bloom"))
    with pytest.raises(ValueError, match="its code calls silu, which nothing can replace"):
        relufy_(registry_model("lfm2"))
    model = tiny_model("bert")
    moefy_(model, MoEficationConfig(expert_size=8, splitter="random", router="random", layers=[1]))
    with pytest.raises(ValueError, match="routed already"):
        relufy_(model)
    assert model.config.hidden_act == "gelu" and not isinstance(find_sites(model)[0].act, nn.ReLU)


# ---- penalties


def by_hand(name: str, neurons: torch.Tensor) -> float:
    """neurons (T, f)"""
    values = []
    for row in neurons.double().tolist():
        total, squares = sum(abs(a) for a in row), sum(a * a for a in row)
        values.append(
            {
                "l1": total / len(row),
                "square_hoyer": total * total / (len(row) * squares),
                "density": sum(math.tanh(10 * abs(a)) for a in row) / len(row),
            }[name]
        )
    return sum(values) / len(values)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name):
    neurons = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).relu()
    found = PENALTIES[name](neurons)
    assert found.shape == (7,) and float(found.mean()) == pytest.approx(by_hand(name, neurons), rel=1e-5)
    assert float(PENALTIES[name](neurons.bfloat16()).mean()) == pytest.approx(by_hand(name, neurons), rel=2e-2)


def test_square_hoyer_is_the_share_of_equally_active_neurons():
    neurons = torch.zeros(3, 10)
    neurons[0, :1], neurons[1, :4], neurons[2] = 5, -2, 0.1
    torch.testing.assert_close(PENALTIES["square_hoyer"](neurons), torch.tensor([0.1, 0.4, 1.0]))
    torch.testing.assert_close(PENALTIES["square_hoyer"](100 * neurons), torch.tensor([0.1, 0.4, 1.0]))


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_finite_where_nothing_fires(name):
    neurons = torch.zeros(2, 5, requires_grad=True)
    value = PENALTIES[name](neurons).sum()
    value.backward()
    assert value == 0 and torch.isfinite(neurons.grad).all()


@pytest.mark.parametrize("settings", [{"penalty": "l2"}, {"weight": -1.0}, {"weight": float("nan")}])
def test_callback_refuses(settings):
    with pytest.raises(ValueError, match="penalty"):
        SparsityPenaltyCallback(**settings)


# ---- training


class Rows(torch.utils.data.Dataset):
    """Texts of one length."""

    def __init__(self, labels: str, count: int = 8, seed: int = 0):
        (batch,) = text_batches(1, rows=count, length=6, labels=labels, classes=2, seed=seed)
        ids = torch.randint(3, 99, (count, 6), generator=torch.Generator().manual_seed(seed))
        labels = batch["labels"] if labels == "class" else ids
        self.rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def batch(self) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in self.rows]) for key in self.rows[0]}


class Logs(TrainerCallback):
    """What comes after the penalty in the list of callbacks sees what it logged."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


HEADS = {"bert": ("AutoModelForSequenceClassification", "class"), "llama": ("AutoModelForCausalLM", "causal")}


def relu_model(name: str, **changes):
    return relufy_(tiny_model(name, HEADS[name][0], **changes))


def train(model, rows, callbacks, folder, steps: int = 1, batch_size: int = 8, lr: float = 0.5, **settings) -> Trainer:
    """Plain gradient descent: one step shows the whole gradient."""
    args = TrainingArguments(
        str(folder),
        **{"logging_steps": 1, **settings},
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def penalty_by_hand(model, batch, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and the penalty: mean over layers and tokens, computed with hooks of our own, differentiable."""
    seen = []
    handles = [site.down.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for site in find_sites(model)]
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    values = []
    for neurons in seen:
        a = neurons.flatten(0, -2)
        if name == "l1":
            values.append(a.abs().mean())
        elif name == "density":
            values.append((10 * a.abs()).tanh().mean())
        else:
            values.append(((a.abs().sum(1) ** 2) / (a.square().sum(1) * a.shape[1])).mean())
    return loss, sum(values) / len(values)


def hooks_of(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", HEADS)
def test_one_step_follows_loss_plus_weighted_penalty(name, penalty, tmp_path):
    model, rows, logs = relu_model(name).train(), Rows(HEADS[name][1]), Logs()
    manual, hooks = copy.deepcopy(model), hooks_of(model)
    loss, activity = penalty_by_hand(manual, rows.batch(), penalty)
    (loss + 3 * activity).backward()
    loss, activity = float(loss.detach()), float(activity.detach())
    trainer = train(model, rows, [SparsityPenaltyCallback(penalty, 3.0), logs], tmp_path)
    for (key, ours), theirs in zip(model.named_parameters(), manual.parameters(), strict=True):
        expected = theirs if theirs.grad is None else theirs - 0.5 * theirs.grad
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6, msg=key)
    assert hooks_of(model) == hooks  # removed after training
    first = next(entry for entry in logs.seen if "loss" in entry)
    assert first["sparsity_penalty"] == pytest.approx(activity, rel=1e-4)
    assert first["loss"] == pytest.approx(loss + 3 * activity, rel=1e-4)
    assert trainer.state.global_step == 1


def test_the_penalty_is_in_the_history_of_the_trainer(tmp_path):
    trainer = train(relu_model("bert"), Rows("class"), [SparsityPenaltyCallback("l1", 0.1)], tmp_path, steps=3)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3 and all(0 < entry["sparsity_penalty"] < 10 for entry in steps)


def test_logged_is_the_mean_since_the_last_log(tmp_path):
    found = {}
    for interval in (1, 2):
        callbacks = [SparsityPenaltyCallback("l1", 1.0), logs := Logs()]
        train(relu_model("bert"), Rows("class"), callbacks, tmp_path, steps=4, batch_size=4, logging_steps=interval)
        found[interval] = [entry["sparsity_penalty"] for entry in logs.seen if "loss" in entry]
    each, pairs = found[1], found[2]
    assert len(each) == 4 and pairs == pytest.approx([sum(each[:2]) / 2, sum(each[2:]) / 2], rel=1e-4)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_training_lowers_activity(penalty, tmp_path):
    found = {}
    for weight in (0.0, 2.0):
        model, rows = relu_model("bert"), Rows("class")
        train(model, rows, [SparsityPenaltyCallback(penalty, weight)], tmp_path, steps=20, lr=0.3)
        with torch.no_grad():
            found[weight] = float(penalty_by_hand(model, rows.batch(), penalty)[1])
    assert found[2.0] < 0.8 * found[0.0]


def test_weight_zero_changes_nothing(tmp_path):
    plain, watched = relu_model("bert"), relu_model("bert")
    train(plain, Rows("class"), None, tmp_path, steps=3)
    train(watched, Rows("class"), [SparsityPenaltyCallback("l1", 0.0)], tmp_path, steps=3)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_evaluation_loss_is_without_penalty(tmp_path):
    model, rows = relu_model("bert"), Rows("class")
    callback = SparsityPenaltyCallback("l1", 5.0)
    args = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    callback.on_train_begin(args, None, None, model=model)
    model.eval()
    with torch.no_grad():
        plain = float(relu_model("bert").eval()(**rows.batch()).loss)
        assert float(model(**rows.batch()).loss) == pytest.approx(plain)
        model.train()
        assert float(model(**rows.batch()).loss) > plain + 0.1
        callback.on_train_end(args, None, None)
        assert float(model(**rows.batch()).loss) == pytest.approx(plain)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_padding_does_not_count(penalty, tmp_path):
    """A batch of one text costs what it costs with padding, whatever the padded positions do."""
    model = relu_model("bert").train()
    callback = SparsityPenaltyCallback(penalty, 1.0)
    callback.on_train_begin(TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), None, None, model=model)
    short = {key: value[:1] for key, value in Rows("class").batch().items()}
    short["attention_mask"] = torch.ones_like(short["input_ids"])
    padded = {**short, "input_ids": torch.cat([short["input_ids"], torch.zeros(1, 5).long()], 1)}
    padded["attention_mask"] = (padded["input_ids"] != 0).long()
    losses = []
    for batch in (short, padded, {**padded, "attention_mask": torch.ones(1, 11).long()}):
        losses.append(float(model(**batch).loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_accumulated_gradients_are_those_of_one_batch(weight, tmp_path):
    """Of a model that normalises its loss by the Trainer's count of items over all accumulated batches."""
    one, many, rows = relu_model("llama"), relu_model("llama"), Rows("causal")
    train(one, rows, [SparsityPenaltyCallback("square_hoyer", weight)], tmp_path)
    train(
        many,
        rows,
        [SparsityPenaltyCallback("square_hoyer", weight)],
        tmp_path,
        batch_size=2,
        gradient_accumulation_steps=4,
    )
    for (key, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=key)


def test_accumulated_penalty_of_a_classifier_is_that_of_one_batch(tmp_path):
    """The penalty's own part of the step: BERT's loss is not normalised over accumulated batches by transformers."""
    rows, moved = Rows("class"), {}
    for size, steps in ((8, 1), (2, 4)):
        for weight in (0.0, 3.0):
            model = relu_model("bert")
            callback = SparsityPenaltyCallback("square_hoyer", weight)
            train(model, rows, [callback], tmp_path, batch_size=size, gradient_accumulation_steps=steps)
            moved[size, weight] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(moved[8, 3.0] - moved[8, 0.0], moved[2, 3.0] - moved[2, 0.0], rtol=1e-3, atol=5e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, saving = relu_model("bert"), relu_model("bert")
    train(plain, Rows("class"), [SparsityPenaltyCallback("l1", 3.0)], tmp_path)
    train(saving, Rows("class"), [SparsityPenaltyCallback("l1", 3.0)], tmp_path, gradient_checkpointing=True)
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=key)


def test_label_smoothing_hides_the_loss(tmp_path):
    with pytest.raises(ValueError, match="label smoothing"):
        train(relu_model("bert"), Rows("class"), [SparsityPenaltyCallback()], tmp_path, label_smoothing_factor=0.1)


def test_a_callback_can_be_used_again(tmp_path):
    callback = SparsityPenaltyCallback("l1", 3.0)
    first, second, fresh = relu_model("bert"), relu_model("bert"), relu_model("bert")
    for model in (first, second):
        train(model, Rows("class"), [callback], tmp_path)
    train(fresh, Rows("class"), [SparsityPenaltyCallback("l1", 3.0)], tmp_path)
    assert hooks_of(first) == hooks_of(second) == 0
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), fresh.parameters(), strict=True))


def test_a_moefied_model_can_be_trained_with_it(tmp_path):
    model = relu_model("bert")
    moefy_(
        model,
        MoEficationConfig(expert_size=8, splitter="random", router="random", selection={"type": "top_k", "k": 0.5}),
    )
    before = hooks_of(model)
    trainer = train(model, Rows("class"), [SparsityPenaltyCallback("l1", 3.0)], tmp_path, steps=2)
    assert trainer.state.global_step == 2 and hooks_of(model) == before
