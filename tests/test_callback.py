"""The callback in real Trainers: what happens when, resumed runs, saved checkpoints, and refusals."""

import copy
import importlib.util
import json
import re
import shutil

import peft
import pytest
import torch
import transformers
from batches import text_batches
from tiny import tiny_model
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from moefy_hf import MoEficationCallback, MoEficationConfig, Phase, moefy_, relufy_
from moefy_hf.errors import UnsupportedModel
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.moefied import is_moefied
from moefy_hf.training.monitor import RoutingMonitor

STEPS = 12
SCHEDULE = [Phase(3, k=1.0, name="dense"), Phase(8, start=1.0, split=True, name="anneal"), Phase(1.0, name="tune")]
CONFIG = {
    "expert_size": 8,
    "splitter": "coactivation",
    "router": "linear",
    "selection": {"type": "top_k", "k": 1 / 3},
    "calibration_tokens": 300,
}
FIXED = {**CONFIG, "splitter": "random", "router": "random"}
HEADS = {
    "bert": ("AutoModelForSequenceClassification", "class"),
    "llama": ("AutoModelForCausalLM", "causal"),
    "t5": ("AutoModelForSeq2SeqLM", "seq2seq"),
}


class Rows(Dataset):
    """Texts of one length."""

    def __init__(self, name: str = "bert", count: int = 64):
        (batch,) = text_batches(1, rows=count, labels=HEADS[name][1], classes=2)
        ids = torch.randint(3, 99, (count, 12), generator=torch.Generator().manual_seed(0))
        labels = batch["labels"] if name == "bert" else ids
        self.rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def dense_model(name: str = "bert", dropout: float = 0.1, **changes):
    """With dropout: a resumed run must find the same random numbers."""
    model = relufy_(tiny_model(name, HEADS[name][0], **changes))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def trainer_for(model, folder, callback, name: str = "bert", **settings) -> Trainer:
    settings = {"save_strategy": "no", "max_steps": STEPS, "learning_rate": 3e-3, "logging_steps": 1, **settings}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    args = TrainingArguments(str(folder), **{"per_device_train_batch_size": 8, **quiet, **settings})
    trainer = Trainer(model, args, train_dataset=Rows(name), eval_dataset=Rows(name, 16), callbacks=[callback])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def callback_for(schedule=SCHEDULE, calibration=None, **changes) -> MoEficationCallback:
    return MoEficationCallback(MoEficationConfig(**{**CONFIG, **changes}), calibration, schedule)


class Watch(transformers.TrainerCallback):
    """Experts per layer at each step; added after the callback under test."""

    def __init__(self):
        self.counts = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.counts.append([site.act.selection.k for site in model.moe_sites()])


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", HEADS)
def test_the_schedule_is_followed(name, tmp_path):
    model, watch = dense_model(name), Watch()
    trainer = trainer_for(model, tmp_path, callback_for(), name)
    assert trainer.model is model and is_moefied(model)
    assert all(site.act.selection.k == 6 for site in model.moe_sites())
    trainer.add_callback(watch)
    trainer.train()
    average = [sum(counts) / len(counts) for counts in watch.counts]
    assert average[:4] == [6.0] * 4 and average[8:] == [2.0] * 4
    assert all(a >= b for a, b in zip(average, average[1:], strict=False)) and len(set(average)) > 3
    section = model.config.moefication
    assert section["splits"] == 1 and "sensitivity" in section
    assert section["selection"] == {"type": "top_k", "k": 1 / 3, "allocation": "sensitivity"}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["moe_phase"] for entry in logs] == [1] * 3 + [2] * 5 + [3] * 4
    assert [entry["moe_experts"] for entry in logs] == pytest.approx([a / 6 for a in average])
    for entry in logs[-4:]:
        assert 0 < entry["moe_captured"] <= 1 and 0 <= entry["moe_load_entropy"] <= 1.001
        assert entry["moe_dead_experts"] >= 0
    assert all(loss == loss for loss in losses_of(trainer))


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_a_schedule_spends_a_budget_by_angles(kind, tmp_path):
    selection = {"type": kind, "k": 0.5, "allocation": "angular"}
    callback = callback_for(**{**FIXED, "selection": selection})
    model = dense_model()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(5)
    trainer_for(model, tmp_path, callback).train()
    section = model.config.moefication
    assert section["selection"] == selection and "sensitivity" not in section
    first, second = section["angular"]["distance"]
    spent = [site.act.k for site in model.moe_sites()]
    assert sum(spent) == pytest.approx(6) and first < second and spent[0] < spent[1]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_splitting_with_all_experts_changes_nothing(optim, tmp_path):
    """Neurons, and what the optimizer remembers of them, move together: losses are those of the dense run."""
    losses = []
    for callback in (transformers.TrainerCallback(), callback_for([Phase(4, k=1.0), Phase(1.0, k=1.0, split=True)])):
        model = dense_model()
        before = model.bert.encoder.layer[0].intermediate.dense.weight.clone()
        trainer = trainer_for(model, tmp_path, callback, optim=optim, learning_rate=1e-3)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    assert len(set(losses[0])) > STEPS // 2
    moved = (model.bert.encoder.layer[0].intermediate.dense.weight - before).abs().amax(1)
    assert (moved > 0.1).sum() > 20  # neurons did change places


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_for(dense_model(), folder, callback_for(), save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer, folder


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 8, 11])
def test_resumed_runs_end_with_the_same_weights(whole, step, tmp_path):
    """Bit for bit, from any phase, also from a folder that is not the run's own."""
    trainer, folder = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / "elsewhere")
    resumed = trainer_for(dense_model(seed=5), tmp_path / "run", callback_for())
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert same(resumed.model, trainer.model)
    assert resumed.model.config.moefication == trainer.model.config.moefication
    assert [s.act.selection for s in resumed.model.moe_sites()] == [s.act.selection for s in trainer.model.moe_sites()]
    assert losses_of(resumed) == losses_of(trainer)


def test_restored_callbacks_continue_too(whole, tmp_path):
    trainer, folder = whole
    other = MoEficationCallback(CONFIG, None, [Phase(1.0, k=1.0)])  # what the checkpoint says wins
    resumed = trainer_for(dense_model(), tmp_path, other, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert same(resumed.model, trainer.model)


@pytest.mark.parametrize("step", [2, 6, 12])
def test_checkpoints_of_every_phase_load(whole, step):
    _, folder = whole
    path = folder / f"checkpoint-{step}"
    saved = json.loads((path / "config.json").read_text())["moefication"]
    assert saved["splits"] == (step > 2)
    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True).eval()
    assert type(model).__name__ == "MoefiedBertForSequenceClassification"
    assert {2: 12, 6: 8, 12: 4}[step] == sum(site.act.selection.k for site in model.moe_sites())
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    model.set_selection(k=1.0, allocation="uniform")
    batch = {key: value[None] for key, value in Rows()[0].items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits, rtol=1e-5, atol=1e-6)


def test_the_best_model_comes_back_with_its_budget(tmp_path):
    class Picky(Trainer):
        def evaluate(self, *args, **kwargs):
            found = super().evaluate(*args, **kwargs)
            return found | {"eval_distance": float(abs(self.state.global_step - 6))}

    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "distance", "greater_is_better": False}
    trainer = trainer_for(dense_model(), tmp_path, callback_for(), **settings)
    trainer.__class__ = Picky
    trainer.train()
    assert trainer.state.best_global_step == 6
    saved = json.loads((tmp_path / "checkpoint-6" / "config.json").read_text())["moefication"]
    assert trainer.model.config.moefication == saved
    assert sum(site.act.selection.k for site in trainer.model.moe_sites()) == 8


def test_given_calibration_is_used(tmp_path):
    read = []

    class Batches:
        def __iter__(self):
            for batch in text_batches(40):
                read.append(batch)
                yield batch

    trainer_for(dense_model(), tmp_path, callback_for(calibration=Batches())).train()
    assert 3 < len(read) < 40


def test_a_converted_model_is_fine_tuned_at_its_budget(tmp_path):
    model = dense_model()
    moefy_(model, MoEficationConfig(**FIXED))
    before, watch = copy.deepcopy(model.config.moefication), Watch()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trainer_for(model, tmp_path, callback_for(), learning_rate=1e-5)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.counts == [[2, 2]] * STEPS and model.config.moefication == before
    for key, value in model.state_dict().items():  # nothing was permuted
        torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-3)
    assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_lora_of_a_converted_model(tmp_path):
    model = dense_model()
    moefy_(model, MoEficationConfig(**FIXED))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lora = peft.LoraConfig(target_modules=["query", "intermediate.dense", "output.dense"], r=2)
    trainer = trainer_for(peft.get_peft_model(model, lora), tmp_path, callback_for())
    trainer.train()
    moved = [key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert moved and all("lora" in key for key in moved)
    merged = trainer.model.merge_and_unload()
    assert is_moefied(merged) and list(merged.state_dict()) == list(before)
    assert any(not torch.equal(value, before[key]) for key, value in merged.state_dict().items())
    assert [site.act.selection.k for site in merged.moe_sites()] == [2, 2]


@pytest.mark.parametrize("schedule", ["smoe_dropout", "switchable"])
def test_published_methods_are_schedules(schedule, tmp_path):
    watch, selection = Watch(), {"type": "top_k", "k": 2, "allocation": "uniform"}
    callback = callback_for(schedule, splitter="parameter_clustering", router="random", selection=selection)
    trainer = trainer_for(dense_model(), tmp_path, callback, max_steps=16)
    trainer.add_callback(watch)
    trainer.train()
    counts, last = [each[0] for each in watch.counts], trainer.model.moe_sites()[0].act.selection.k
    if schedule == "switchable":
        assert counts == [6, 6, 2, 2] * 4 and last == 2
    else:
        assert counts[0] == 2 and counts == sorted(counts) and counts[-1] >= 5 and last == 6


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [{"gradient_accumulation_steps": 3}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_with_what_trainers_do(settings, tmp_path):
    trainer = trainer_for(dense_model(), tmp_path, callback_for(), **settings)
    trainer.train()
    assert len(losses_of(trainer)) == STEPS and all(loss < 5 for loss in losses_of(trainer))
    assert sum(site.act.selection.k for site in trainer.model.moe_sites()) == 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", HEADS)
def test_one_router_for_all_layers(name, tmp_path):
    """Experts are split and aligned in training; layers that are recomputed choose as they did. Once and before the
    first step, for rounding would lead a later split elsewhere."""
    finished = []
    for checkpointing in (False, True):
        model, callback = dense_model(name, dropout=0.0), callback_for("one_step", router="pre_gated")
        callback.calibration = text_batches(20, rows=8, labels=HEADS[name][1], classes=2)
        trainer = trainer_for(model, tmp_path, callback, name, gradient_checkpointing=checkpointing, max_steps=8)
        trainer.train()
        assert model.config.moefication["splits"] == 1
        assert [site.act.router.position for site in model.moe_sites()] == [0, 1] * (len(model.moe_sites()) // 2)
        finished.append(losses_of(trainer))
    assert finished[0] == pytest.approx(finished[1], rel=1e-4)


@pytest.mark.parametrize("schedule", [SCHEDULE, "switchable"], ids=["anneal", "switchable"])
def test_compiled_training_is_the_same_training(schedule, tmp_path):
    """Captured anew for every budget; without code generation, which would only test the compiler."""
    finished = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.compiler.reset()
        callback = callback_for(schedule, expert_size=16)  # three budgets per layer: capturing takes seconds each
        trainer = trainer_for(dense_model(dropout=0.0), tmp_path, callback, max_steps=16, **settings)
        trainer.train()
        finished.append(trainer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain, compiled = finished
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-3)
    counts = [[site.act.selection.k for site in each.model.moe_sites()] for each in finished]
    assert counts[0] == counts[1] and sum(counts[0]) == 2
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in Rows().rows[:8]])}
    with torch.no_grad():
        ours, theirs = (each.model.eval()(**inputs).logits for each in finished)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_subclasses_of_trainer(tmp_path):
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
        save_strategy="no",
        generation_max_length=5,
    )
    model = dense_model("t5")
    trainer = transformers.Seq2SeqTrainer(
        model, args, train_dataset=Rows("t5"), eval_dataset=Rows("t5", 8), callbacks=[callback_for()]
    )
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    assert sum(site.act.selection.k for site in model.moe_sites()) == 8


@pytest.mark.parametrize("kind", ["threshold", "level"])
def test_selections_that_depend_on_the_token_are_measured_where_nothing_else_is_learnt(kind, tmp_path):
    model = dense_model()
    selection = {"type": kind, "k": 1 / 3, "allocation": "uniform"}
    callback = callback_for(splitter="random", router="random", selection=selection)
    trainer = trainer_for(model, tmp_path, callback)
    trainer.train()
    assert kind in model.config.moefication["reach"] and [site.act.k for site in model.moe_sites()] == [2, 2]
    entry = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert 0 < entry["moe_captured"] <= 1 and entry["moe_experts"] == pytest.approx(1 / 3)


def test_figures_of_an_unknown_budget_and_of_no_expert_are_numbers():
    model = moefied_at_level(-100.0)
    monitor = RoutingMonitor()
    monitor.attach(model)
    monitor.watching = True
    model(input_ids=Rows()[0]["input_ids"][None])
    figures = monitor.figures()
    assert "moe_experts" not in figures and figures["moe_captured"] == figures["moe_load_entropy"] == 0
    assert figures["moe_dead_experts"] == 12


def moefied_at_level(level: float):
    """In training mode; nobody has measured what it spends."""
    model = dense_model()
    moefy_(model, MoEficationConfig(**{**FIXED, "selection": {"type": "level", "level": level}}))
    return model.train()


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_size": 7}, "48 neurons do not split into experts of size 7"),
        ({"selection": {"type": "top_k", "k": 9}}, "k=9 is out of range"),
    ],
)
def test_bad_settings_end_before_training(settings, message, tmp_path):
    model = dense_model()
    with pytest.raises(ValueError, match=message):
        trainer_for(model, tmp_path, callback_for(**settings))
    assert not is_moefied(model)


def test_sharded_parameters_are_refused_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="FSDP keeps parameters in shards or copies.*convert the model first"):
        callback_for().on_init_end(args, None, None, model=dense_model())
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed keeps parameters in shards or copies.*convert the model first"):
        callback_for().on_init_end(args, None, None, model=dense_model())
    converted = dense_model()
    moefy_(converted, MoEficationConfig(**FIXED))
    callback_for().on_init_end(args, None, None, model=converted)  # nothing will be permuted


def test_adapters_of_dense_models_are_refused(tmp_path):
    model = peft.get_peft_model(dense_model(), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ValueError, match="moefy_ the model before adding it"):
        trainer_for(model, tmp_path, callback_for())


def test_too_little_data_is_said_when_it_is_found(tmp_path):
    trainer = trainer_for(dense_model(), tmp_path, callback_for(calibration=text_batches(1)))
    with pytest.raises(ValueError, match="calibration is too small"):
        trainer.train()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    plain = transformers.TrainerCallback()
    trainer_for(dense_model(), tmp_path / "dense", plain, save_strategy="steps", save_steps=6).train()
    resumed = trainer_for(dense_model(), tmp_path / "run", callback_for())
    with pytest.raises(ValueError, match="written without a MoEficationCallback"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "dense" / "checkpoint-6"))


def test_optimizers_whose_state_cannot_follow_are_refused(tmp_path):
    trainer = trainer_for(dense_model(), tmp_path, callback_for(), optim="adafactor")
    with pytest.raises(ValueError, match="cannot follow a permutation"):
        trainer.train()


def test_schedules_longer_than_the_training_are_refused(tmp_path):
    trainer = trainer_for(dense_model(), tmp_path, callback_for([Phase(20, k=1.0), Phase(1.0, split=True)]))
    with pytest.raises(ValueError, match="from step 20 to 12 of 12"):
        trainer.train()


def test_phases_after_the_end_are_refused(tmp_path):
    trainer = trainer_for(dense_model(), tmp_path, callback_for([Phase(20, k=1.0), Phase(40, split=True)]))
    with pytest.raises(ValueError, match="train longer"):
        trainer.train()
    assert [site.act.selection.k for site in trainer.model.moe_sites()] == [6, 6]


def test_resuming_with_fewer_steps_splits_late_rather_than_never(whole, tmp_path):
    _, folder = whole
    schedule = [Phase(0.5, k=1.0), Phase(1.0, split=True)]
    first = trainer_for(
        dense_model(), tmp_path / "a", callback_for(schedule), save_strategy="steps", save_steps=4, max_steps=10
    )
    first.train()
    resumed = trainer_for(dense_model(), tmp_path / "b", callback_for(schedule), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert resumed.model.config.moefication["splits"] == 1
    assert sum(site.act.selection.k for site in resumed.model.moe_sites()) == 4


def test_a_model_that_comes_too_late_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2, disable_tqdm=True)
    trainer = Trainer(args=args, model_init=lambda: dense_model(), train_dataset=Rows(), callbacks=[callback_for()])
    with pytest.raises(ValueError, match="model_init= comes too late"):
        trainer.train()
    trainer = Trainer(dense_model(), args, train_dataset=Rows())
    trainer.add_callback(callback_for())
    with pytest.raises(ValueError, match="callbacks="):
        trainer.train()


def test_a_checkpoint_without_the_callback_can_be_gone_on_from_before_the_split(tmp_path):
    plain = transformers.TrainerCallback()
    trainer_for(dense_model(), tmp_path / "dense", plain, save_strategy="steps", save_steps=2).train()
    resumed = trainer_for(dense_model(), tmp_path / "run", callback_for(), save_strategy="steps", save_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "dense" / "checkpoint-2"))
    assert resumed.model.config.moefication["splits"] == 1


def test_routers_of_other_settings_are_refused(whole, tmp_path):
    _, folder = whole
    model = dense_model()
    trainer_for(model, tmp_path, callback_for())
    with pytest.raises(ValueError, match="made with expert_size=8.*says 16"):
        trainer_for(model, tmp_path, callback_for(expert_size=16))
    with pytest.raises(ValueError, match="made with shared_experts=0.*says 1"):
        trainer_for(model, tmp_path, callback_for(shared_experts=1))
    resumed = trainer_for(dense_model(), tmp_path, callback_for(router="mlp"))
    with pytest.raises(ValueError, match="made with router='linear'.*says 'mlp'"):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_one_callback_for_two_models(tmp_path):
    callback, converted = callback_for(), dense_model()
    moefy_(converted, MoEficationConfig(**FIXED))
    trainer_for(converted, tmp_path, callback).train()
    trainer = trainer_for(dense_model(), tmp_path, callback)
    trainer.train()
    assert trainer.model.config.moefication["splits"] == 1


def test_an_iterator_is_refused_where_it_is_read_twice():
    with pytest.raises(ValueError, match="give no iterator"):
        callback_for("switchable", calibration=iter(text_batches(9)))


def test_predictions_that_cannot_be_compared_are_found_before_training(tmp_path):
    model = dense_model(num_labels=1)
    rows = Rows()
    for row in rows.rows:
        row["labels"] = row["labels"].float()
    trainer = trainer_for(model, tmp_path, callback_for())
    trainer.train_dataset = rows
    with pytest.raises(ValueError, match='one of several classes.*"uniform"'):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_dense_best_model_is_said_to_be_dense(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("moefy_hf.training.callback.logger.warning", said.append)
    trainer = trainer_for(dense_model(), tmp_path, callback_for())
    trainer.add_callback(StopAt(2))
    trainer.train()
    assert trainer.state.global_step == 2 and "not split yet" in said[0]


def test_lines_say_what_happens(tmp_path, capsys):
    trainer_for(dense_model(), tmp_path, callback_for(), disable_tqdm=False).train()
    out = re.sub(r"\s+", " ", "".join(capsys.readouterr()))
    assert "step 3: phase 2 of 3 begins: anneal" in out
    assert "step 3: 2 FFNs split, 6 experts of 8 neurons" in out and "training ends with experts per FFN" in out


OPTIMIZERS = {"adafactor": None, "adamw_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizer_that_cannot_follow_a_split_is_refused_before_the_first_step(optim, tmp_path):
    if OPTIMIZERS[optim] and importlib.util.find_spec(OPTIMIZERS[optim]) is None:
        pytest.skip(f"needs {OPTIMIZERS[optim]}")
    wide = {"hidden_size": 64, "intermediate_size": 256}  # 8-bit optimizers keep small matrices in full
    trainer = trainer_for(dense_model(**wide), tmp_path, callback_for(), optim=optim)
    with pytest.raises(ValueError, match="cannot follow a permutation; use AdamW or SGD"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.model.config.moefication["splits"] == 0


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adagrad", "rmsprop"])
def test_an_optimizer_that_is_tried_is_not_changed(optim, tmp_path, monkeypatch):
    results = []
    for tried in (True, False):
        trainer = trainer_for(dense_model(), tmp_path, callback_for(), optim=optim)
        if not tried:
            monkeypatch.setattr("moefy_hf.training.callback.check_optimizer", lambda *_: None)
        trainer.train()
        assert trainer.model.config.moefication["splits"] == 1
        results.append(trainer.model)
    assert same(*results)


def test_a_schedule_without_a_split_takes_any_optimizer(tmp_path):
    model = dense_model()
    moefy_(model, MoEficationConfig(**{**FIXED, "selection": {"type": "top_k", "k": 2, "allocation": "uniform"}}))
    trainer = trainer_for(model, tmp_path, callback_for(), optim="adafactor", max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_order_of_neurons_is_kept_through_a_split(tmp_path):
    model = dense_model()
    frozen = [site.weights().down.clone() for site in find_sites(model)]
    trainer = trainer_for(model, tmp_path, callback_for([Phase(2, k=1.0), Phase(1.0, split=True)]), learning_rate=0.0)
    for site, before in zip(model.moe_sites(), frozen, strict=True):
        assert torch.equal(site.act.neuron_order.long(), torch.arange(before.shape[1]))
    trainer.train()
    for site, before in zip(model.moe_sites(), frozen, strict=True):
        order = site.act.neuron_order.long()
        assert not torch.equal(order, torch.arange(len(order)))
        assert torch.equal(site.weights().down, before[:, order])


def test_a_model_that_is_taken_for_something_else_stays_dense(tmp_path):
    """Routers go in when the Trainer is made: an FFN that computes something else is noticed then."""
    model = dense_model()
    act = model.bert.encoder.layer[0].intermediate
    forward = type(act).forward
    act.forward = lambda x: forward(act, x).square()
    with pytest.raises(UnsupportedModel, match="^bert.encoder.layer.0: this BertLayer does not compute"):
        trainer_for(model, tmp_path, callback_for())
    assert not is_moefied(model) and "moefication" not in vars(model.config)
