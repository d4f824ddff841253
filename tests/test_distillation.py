"""Distillation: the loss against a direct computation, and that it pulls a model towards its teacher."""

import copy

import peft
import pytest
import torch
import transformers
from batches import text_batches
from tiny import convert, tiny_model
from transformers import Trainer, TrainingArguments

from moefy_hf import DistillationCallback, MoEficationCallback
from moefy_hf.modeling.ffn_sites import find_sites

HEADS = {
    "bert": ("AutoModelForSequenceClassification", "class"),
    "llama": ("AutoModelForCausalLM", "causal"),
    "t5": ("AutoModelForSeq2SeqLM", "seq2seq"),
}


def arguments(folder, **settings) -> TrainingArguments:
    settings = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", **settings}
    return TrainingArguments(str(folder), **settings)


def pair(name: str, k: int = 2):
    """(a model whose routers choose badly, its dense self)"""
    teacher = tiny_model(name, HEADS[name][0])
    student = copy.deepcopy(teacher)
    convert(student, k=k)
    return student.train(), teacher


def batch_of(name: str) -> dict[str, torch.Tensor]:
    return text_batches(1, labels=HEADS[name][1], classes=2)[0]


@pytest.mark.parametrize("ffn_weight", [0.0, 0.7])
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_that_of_a_direct_computation(name, ffn_weight, tmp_path):
    student, teacher = pair(name)
    batch, outputs, ffns = batch_of(name), [], ([], [])
    for model, seen in zip((student, teacher), ffns, strict=True):
        handles = [s.down.register_forward_hook(lambda _, x, y, seen=seen: seen.append(y)) for s in find_sites(model)]
        outputs.append(model(**batch))
        for handle in handles:
            handle.remove()
    rows = [[], []]
    for output, found in zip(outputs, rows, strict=True):
        for row in range(4):
            if name == "bert":
                found.append(output.logits[row])
                continue
            for position, label in enumerate(batch["labels"][row]):
                if label != -100 and (name == "t5" or position > 0):
                    found.append(output.logits[row, position - (name == "llama")])
    q, p = ((torch.stack(found) / 3).softmax(-1) for found in rows)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    errors = [(a - b).square().sum() / b.square().sum() for a, b in zip(*ffns, strict=True)]
    expected = outputs[0].loss + 2 * (expected + ffn_weight * sum(errors) / len(errors))
    callback = DistillationCallback(teacher, weight=2.0, temperature=3.0, ffn_weight=ffn_weight)
    callback.on_train_begin(arguments(tmp_path), None, None, model=student)
    loss = student(**batch).loss
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(loss) > float(outputs[0].loss) + 1e-3
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    callback.on_train_end(None, None, None)
    assert float(student(**batch).loss) == pytest.approx(float(outputs[0].loss), rel=1e-6)


def test_a_model_equal_to_its_teacher_costs_nothing(tmp_path):
    teacher = tiny_model("bert", HEADS["bert"][0])
    student = copy.deepcopy(teacher).train()
    callback = DistillationCallback(teacher, ffn_weight=1.0)
    callback.on_train_begin(arguments(tmp_path), None, None, model=student)
    student(**batch_of("bert"))
    assert float(callback.logged) == pytest.approx(0, abs=1e-6) and callback.steps == 1


def test_training_pulls_the_student_towards_the_teacher(tmp_path):
    found = {}
    rows = [
        {"input_ids": ids, "labels": label}
        for ids, label in zip(torch.randint(3, 99, (16, 6)), torch.randint(0, 2, (16,)), strict=True)
    ]
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
    for weight in (0.0, 5.0):
        student, teacher = pair("bert")
        args = arguments(tmp_path, max_steps=20, learning_rate=3e-3, per_device_train_batch_size=8, logging_steps=5)
        trainer = Trainer(student, args, train_dataset=rows, callbacks=[DistillationCallback(teacher, weight)])
        trainer.train()
        assert all("distillation" in entry for entry in trainer.state.log_history if "loss" in entry)
        with torch.no_grad():
            logits = [model.eval()(**batch).logits.log_softmax(-1) for model in (student, teacher)]
        found[weight] = float(torch.nn.functional.kl_div(*logits, log_target=True))
    assert found[5.0] < 0.5 * found[0.0]


def test_an_adapter_s_labels_are_shifted_like_its_teacher_s(tmp_path):
    teacher = tiny_model("llama", HEADS["llama"][0])
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    student = peft.get_peft_model(copy.deepcopy(teacher), lora).train()  # adapters start at zero: nothing is changed
    batch = batch_of("llama")
    batch["labels"][:, :2] = -100  # as a prompt's are
    callback = DistillationCallback(teacher)
    callback.on_train_begin(arguments(tmp_path), None, None, model=student)
    student(**batch)
    assert callback.steps == 1 and float(callback.logged) == pytest.approx(0, abs=1e-6)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path):
    class Interrupted(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    student, teacher = pair("bert")
    plain = float(student(**batch_of("bert")).loss.detach())
    rows = [{key: value[0] for key, value in batch_of("bert").items()}] * 8
    args = arguments(tmp_path, max_steps=3, learning_rate=0.0)
    callbacks = [DistillationCallback(teacher, 100.0), MoEficationCallback(), Interrupted()]
    with pytest.raises(KeyboardInterrupt):
        Trainer(student, args, train_dataset=rows, callbacks=callbacks).train()
    Trainer(student, args, train_dataset=rows, callbacks=[DistillationCallback(teacher, 0.0)]).train()
    assert float(student(**batch_of("bert")).loss.detach()) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("settings", [{"weight": -1.0}, {"temperature": 0.0}, {"ffn_weight": -0.1}])
def test_refuses_bad_settings(settings):
    with pytest.raises(ValueError, match="must"):
        DistillationCallback(tiny_model("bert", HEADS["bert"][0]), **settings)


def test_refuses_another_teacher(tmp_path):
    student, _ = pair("bert")
    callback = DistillationCallback(tiny_model("bert", HEADS["bert"][0], num_hidden_layers=1), ffn_weight=1.0)
    with pytest.raises(ValueError, match="1 FFNs, the model 2"):
        callback.on_train_begin(arguments(tmp_path), None, None, model=student)
    callback = DistillationCallback(tiny_model("bert", HEADS["bert"][0], num_labels=3))
    callback.on_train_begin(arguments(tmp_path), None, None, model=student)
    with pytest.raises(ValueError, match="heads differ"):
        student(**batch_of("bert"))
