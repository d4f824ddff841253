"""Learned selection against loops of our own, in real Trainers: stages, resumed runs, checkpoints, errors."""

import json
import math
import shutil

import peft
import pytest
import torch
import transformers
from test_callback import Rows, StopAt, callback_for, dense_model, losses_of, same
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from moefy_hf import LearnedSelectionCallback, MoEficationConfig, Phase, load, moefy_
from moefy_hf.modeling.ffn_sites import find_sites

STEPS, TAU = 12, 0.5
EXPERTS, SIZE = 6, 8
HARD = {"type": "level", "level": math.log(2)}


def moefied(name: str = "bert", seed: int = 0, router: str = "sigmoid", dropout: float = 0.1, **settings):
    """With routers as calibration leaves them."""
    model = dense_model(name, dropout, seed=seed)
    settings = {"selection": {"type": "top_k", "k": 3, "allocation": "uniform"}, **settings}
    config = MoEficationConfig(expert_size=SIZE, splitter="random", router=router, **settings)
    ids = torch.randint(3, 99, (64, 12), generator=torch.Generator().manual_seed(1))
    moefy_(model, config, [{"input_ids": ids}], progress=False)
    return model.train()


def trainer_for(model, folder, callbacks, name: str = "bert", rows=None, **settings) -> Trainer:
    settings = {"save_strategy": "no", "max_steps": STEPS, "learning_rate": 3e-3, "logging_steps": 1, **settings}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    args = TrainingArguments(str(folder), **{"per_device_train_batch_size": 8, **quiet, **settings})
    trainer = Trainer(model, args, train_dataset=rows or Rows(name), eval_dataset=Rows(name, 16), callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def routers_of(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if ".router." in key}


class Watch(TrainerCallback):
    """Routers, the rest, and what is trainable, as each step finds them; added after the callback under test."""

    def __init__(self):
        self.routers, self.rest, self.trainable, self.soft = [], [], [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.routers.append(torch.cat([value.flatten() for value in routers_of(model).values()]))
        self.rest.append(model.state_dict()["bert.encoder.layer.0.output.dense.weight"].clone())
        sites = model.moe_sites()
        self.trainable.append([p.requires_grad for site in sites for p in site.act.router.parameters()])
        self.soft.append([site.act.weighs for site in sites])


# ---- by hand


class Loops(nn.Module):
    """In the place of a dense model's activation: experts one by one, with weights or a threshold, and their costs."""

    def __init__(self, act: nn.Module, router: torch.Tensor, shared: int, hard: bool):
        super().__init__()
        self.act, self.router, self.shared, self.hard = act, nn.Parameter(router.clone()), shared, hard
        self.squares, self.inverses, self.chosen = [], [], []

    def see(self, linear: nn.Module, args: tuple) -> None:
        self.x = args[0]

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        shape, rows = h.shape, []
        for x, neurons in zip(self.x.flatten(0, -2), self.act(h).flatten(0, -2), strict=True):
            blocks = [neurons[expert * SIZE : (expert + 1) * SIZE] for expert in range(EXPERTS)]
            for expert in range(self.shared, EXPERTS):
                strength = 1 / (1 + torch.exp(-(self.router[expert - self.shared] * x).sum()))
                self.squares.append(strength**2)
                self.inverses.append(1 / ((strength - TAU) ** 2 + 0.01))
                self.chosen.append(bool(strength >= TAU))
                weight = float(self.chosen[-1]) if self.hard else strength
                blocks[expert] = weight * blocks[expert]
            rows.append(torch.cat(blocks))
        return torch.stack(rows).reshape(shape)


def by_loops(model, name: str, hard: bool = False):
    """A dense model with the weights of a MoEfied one, and the loops in its FFNs."""
    dense = dense_model(name, 0.0)
    state = model.state_dict()
    dense.load_state_dict({key: state[key] for key in dense.state_dict()}, strict=True)
    routers = [state[key] for key in state if ".router." in key]
    shared = model.config.moefication["shared_experts"]
    loops = []
    for site, router in zip(find_sites(dense), routers, strict=True):
        loops.append(Loops(site.act, router, shared, hard))
        site.first.register_forward_pre_hook(loops[-1].see)
        site.replace_act(loops[-1])
    return dense, loops


@pytest.mark.parametrize(("name", "shared"), [("bert", 0), ("llama", 1)])
def test_one_step_follows_the_loss_of_loops(name, shared, tmp_path):
    """Plain gradient descent: one step shows the whole gradient, of routers and of all that lies below them."""
    model, rows = moefied(name, dropout=0.0, shared_experts=shared), Rows(name, 4)
    manual, loops = by_loops(model, name)
    batch = {key: torch.stack([row[key] for row in rows.rows]) for key in rows.rows[0]}
    loss = manual.train()(**batch).loss
    costs = [
        sum(each.squares) / len(each.squares) * 3.0 + sum(each.inverses) / len(each.inverses) * 0.2 for each in loops
    ]
    total = loss + sum(costs) / len(costs)
    total.backward()
    expected = {key: value for key, value in manual.named_parameters() if ".router" not in key}
    names = [f"{site.name}.{site.spec.act}.router.weight" for site in find_sites(model)]
    expected |= {name: loop.router for name, loop in zip(names, loops, strict=True)}
    settings = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"max_steps": 1, "per_device_train_batch_size": 4}
    callback = LearnedSelectionCallback(eta=3.0, tau=TAU, lam=0.2, until=1.0)
    trainer = trainer_for(model, tmp_path, [callback], name, rows, **settings)
    trainer.train()
    assert losses_of(trainer) == pytest.approx([float(total.detach())], rel=1e-5)
    ours = dict(model.named_parameters())
    assert set(ours) == set(expected)
    for key, theirs in expected.items():
        stepped = theirs if theirs.grad is None else theirs - 0.05 * theirs.grad
        torch.testing.assert_close(ours[key], stepped, rtol=1e-4, atol=2e-6, msg=key)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["router_loss"] == pytest.approx(float((sum(costs) / len(costs)).detach()), rel=1e-5)
    chosen = [sum(each.chosen) / len(each.chosen) * (EXPERTS - shared) + shared for each in loops]
    assert 0.05 < entry["moe_experts"] < 0.95
    assert entry["moe_experts"] == pytest.approx(sum(chosen) / len(chosen) / EXPERTS, rel=1e-5)


def test_accumulated_batches_and_checkpointed_layers_make_the_same_step(tmp_path):
    """The language model's loss is normalised over accumulated batches by transformers."""
    stepped = {}
    variants = {
        "one": {},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "checkpointed": {"gradient_checkpointing": True},
    }
    for variant, settings in variants.items():
        model = moefied("llama", dropout=0.0)
        settings = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 2, **settings}
        callback = LearnedSelectionCallback(eta=2.0, lam=0.2)
        trainer = trainer_for(model, tmp_path, [callback], "llama", Rows("llama", 8), **settings)
        trainer.train()
        assert len([entry for entry in trainer.state.log_history if "router_loss" in entry]) == 2
        stepped[variant] = model.state_dict()
    for variant in ("accumulated", "checkpointed"):
        for key, value in stepped["one"].items():
            torch.testing.assert_close(stepped[variant][key], value, rtol=1e-4, atol=3e-6, msg=f"{variant} {key}")


def test_padding_does_not_count(tmp_path):
    found = []
    for length in (6, 11):
        model = moefied(dropout=0.0)
        ids = torch.randint(3, 99, (6,), generator=torch.Generator().manual_seed(0))
        row = {"input_ids": torch.cat([ids, torch.zeros(length - 6).long()]), "labels": torch.tensor(0)}
        rows = Rows(count=8)
        rows.rows = [{**row, "attention_mask": (row["input_ids"] != 0).long()}] * 8
        settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
        trainer = trainer_for(model, tmp_path, [LearnedSelectionCallback(1.0, until=1.0)], rows=rows, **settings)
        trainer.train()
        found.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    for key in ("loss", "router_loss", "moe_experts"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4)


# ---- stages


def test_routers_move_in_the_first_stage_only(tmp_path):
    """Although the optimizer remembers where they were going, and would make them decay."""
    model, watch = moefied(), Watch()
    trainer = trainer_for(model, tmp_path, [LearnedSelectionCallback(5.0, until=7)], weight_decay=0.1)
    trainer.add_callback(watch)
    trainer.train()
    ends = [*watch.routers, torch.cat([value.flatten() for value in routers_of(model).values()])]
    moved = [not torch.equal(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    assert moved == [True] * 7 + [False] * 5
    assert all(not torch.equal(a, b) for a, b in zip(watch.rest, watch.rest[1:], strict=False))
    assert watch.trainable == [[True] * 2] * 7 + [[False] * 2] * 5
    assert watch.soft == [[True] * 2] * 7 + [[False] * 2] * 5
    assert model.config.moefication["selection"] == HARD
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    costs = [entry["router_loss"] for entry in logs]
    assert min(costs[:7]) > 0.1 and costs[7:] == [0.0] * 5
    assert all(0 <= entry["moe_experts"] <= 1 for entry in logs)


def test_what_a_run_changes_ends_with_it(tmp_path):
    def hooks(model) -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())

    model = moefied()
    before = hooks(model)
    trainer = trainer_for(model, tmp_path, [LearnedSelectionCallback(1.0)])
    assert all(p.requires_grad for site in model.moe_sites() for p in site.act.router.parameters())
    trainer.add_callback(StopAt(3))
    trainer.train()
    assert trainer.state.global_step == 3 and hooks(model) == before
    for site in model.train().moe_sites():
        assert not site.act.weighs and not any(p.requires_grad for p in site.act.router.parameters())
        assert all(p.grad is None for p in site.act.router.parameters())


def test_a_run_that_failed_leaves_nothing_to_the_next(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = moefied()
    trainer = trainer_for(model, tmp_path, [LearnedSelectionCallback(1.0), Fails()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(site.act.soft for site in model.moe_sites())
    trainer_for(model, tmp_path, [callback_for(router="sigmoid")]).train()
    for site in model.train().moe_sites():
        assert not site.act.weighs and not any(p.requires_grad for p in site.act.router.parameters())


def test_an_end_in_the_first_stage_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("moefy_hf.training.learned_selection.logger.warning", said.append)
    for until, step, warns in ((6, 6, True), (6, 7, False), (1.0, STEPS, False), (0.5, STEPS, False)):
        said.clear()
        trainer_for(moefied(), tmp_path, [LearnedSelectionCallback(1.0, until=until), StopAt(step)]).train()
        assert bool(said) is warns, (until, step)


def share_of(model) -> float:
    """Of the experts, that a model computes: counted by hand."""
    seen = []
    for site in model.moe_sites():
        weight = site.act.router.weight.detach()
        site.first.register_forward_pre_hook(
            lambda _, args, weight=weight: seen.append((args[0] @ weight.T).sigmoid() >= TAU)
        )
    with torch.no_grad():
        model.eval()(input_ids=torch.stack([row["input_ids"] for row in Rows().rows]))
    return float(torch.stack(seen).float().mean())


def test_a_larger_eta_computes_less(tmp_path):
    shares = []
    for eta in (0.0, 1.0, 10.0):
        model = moefied(dropout=0.0)
        trainer = trainer_for(model, tmp_path, [LearnedSelectionCallback(eta)], max_steps=40, learning_rate=1e-2)
        trainer.train()
        shares.append(share_of(model))
        logged = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)["moe_experts"]
        assert logged == pytest.approx(shares[-1], abs=0.1)
    assert shares[0] > shares[1] + 0.05 and shares[1] > shares[2] + 0.05


# ---- resumed runs, checkpoints, evaluation


class Predictions(TrainerCallback):
    """What the model predicts in evaluation mode whenever it is saved."""

    def __init__(self):
        self.found = {}

    def on_save(self, args, state, control, model, **kwargs):
        self.found[state.global_step] = predictions(model)


def predictions(model) -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.stack([row["input_ids"] for row in Rows().rows[:8]])).logits
    model.train(training)
    return logits


def both_callbacks() -> list[TrainerCallback]:
    return [callback_for(router="sigmoid"), LearnedSelectionCallback(5.0, until=7)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step, and predictions at each."""
    folder, watch = tmp_path_factory.mktemp("whole"), Predictions()
    settings = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    trainer = trainer_for(moefied(), folder, [*both_callbacks(), watch], **settings)
    trainer.train()
    return trainer, folder, watch.found


@pytest.mark.parametrize("step", [1, 6, 7, 8, 11])
def test_resumed_runs_end_with_the_same_weights(whole, step, tmp_path):
    """Bit for bit, from either stage, whatever the order of callbacks."""
    trainer, folder, _ = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / "elsewhere")
    resumed = trainer_for(moefied(seed=5), tmp_path / "run", both_callbacks()[::-1], weight_decay=0.1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert same(resumed.model, trainer.model)
    assert resumed.model.config.moefication == trainer.model.config.moefication
    assert losses_of(resumed) == losses_of(trainer)


def test_a_trainer_can_go_on_itself(whole, tmp_path):
    trainer, folder, _ = whole
    again = trainer_for(moefied(), tmp_path, both_callbacks(), weight_decay=0.1)
    again.train()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert same(again.model, trainer.model)


@pytest.mark.parametrize("step", [3, 10])
def test_checkpoints_and_evaluation_select_by_threshold_in_both_stages(whole, step):
    _, folder, found = whole
    path = folder / f"checkpoint-{step}"
    saved = json.loads((path / "config.json").read_text())["moefication"]
    assert saved["selection"] == HARD and "reach" not in saved
    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
    assert type(model).__name__ == "MoefiedBertForSequenceClassification"
    torch.testing.assert_close(predictions(model), found[step], rtol=0, atol=0)
    manual, loops = by_loops(model, "bert", hard=True)
    torch.testing.assert_close(predictions(manual), found[step], rtol=1e-5, atol=1e-5)
    chosen = torch.tensor([loop.chosen for loop in loops]).view(2, -1, EXPERTS)  # (layers, tokens, E)
    assert (chosen.any(1) & ~chosen.all(1)).any()  # some experts run for some tokens


def test_what_was_measured_with_other_routers_is_forgotten(tmp_path):
    model = moefied(selection={"type": "level", "k": 0.5, "allocation": "uniform"})
    assert "reach" in model.config.moefication
    trainer_for(model, tmp_path, [LearnedSelectionCallback(1.0)], max_steps=2).train()
    assert "reach" not in model.config.moefication and all(site.act.k is None for site in model.moe_sites())


# ---- adapters


LORA = {"target_modules": ["query", "intermediate.dense", "output.dense"], "r": 2}


def adapted(seed: int = 0):
    model = moefied(seed=seed)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=["router"]))


def test_an_adapter_learns_its_selection_and_is_resumed(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    trainer = trainer_for(adapted(), tmp_path / "whole", both_callbacks(), **settings)
    first = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    last = trainer.model.state_dict()
    moved = [key for key in first if not torch.equal(first[key], last[key])]
    assert moved and all("lora" in key or ".router.modules_to_save." in key for key in moved)
    assert sum(".router." in key for key in moved) == 2
    for step in (3, 7, 10):
        resumed = trainer_for(adapted(), tmp_path / f"from-{step}", both_callbacks(), weight_decay=0.1)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(resumed.model, trainer.model)
    logits = predictions(trainer.model)
    merged = trainer.model.merge_and_unload()
    torch.testing.assert_close(predictions(merged), logits, rtol=1e-4, atol=1e-5)
    assert merged.config.moefication["selection"] == HARD
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    torch.testing.assert_close(predictions(loaded), predictions(merged), rtol=0, atol=0)


def test_an_adapters_routers_are_frozen_in_the_second_stage(tmp_path):
    class Routers(TrainerCallback):
        seen = []

        def on_step_begin(self, args, state, control, model, **kwargs):
            found = [(key, p) for key, p in model.named_parameters() if ".router." in key]
            assert not any(p.requires_grad for key, p in found if "original_module" in key)
            copies = [p for key, p in found if "modules_to_save" in key]
            self.seen.append((copies[0].detach().clone(), copies[0].requires_grad))

    trainer = trainer_for(adapted(), tmp_path, [LearnedSelectionCallback(5.0, until=7), Routers()])
    trainer.train()
    weights, trainable = zip(*Routers.seen, strict=True)
    assert list(trainable) == [True] * 7 + [False] * 5
    moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert moved == [True] * 7 + [False] * 4


# ---- with what else there is


@pytest.mark.parametrize("implementation", ["torch", "cpu"])
def test_other_implementations_run_masked_in_the_first_stage(implementation):
    model = moefied(dropout=0.0)
    ids = Rows()[0]["input_ids"][None, :3]  # so few that torch, too, computes the selected experts alone
    with torch.no_grad():
        outputs = {}
        for soft in (True, False):
            for site in model.moe_sites():
                site.act.soft = soft
            for name in ("masked", implementation):
                model.set_moe_implementation(name)
                outputs[soft, name] = model(input_ids=ids).logits
    for soft in (True, False):
        torch.testing.assert_close(outputs[soft, "masked"], outputs[soft, implementation], rtol=1e-4, atol=1e-5)
    assert (outputs[True, "masked"] - outputs[False, "masked"]).abs().max() > 1e-3


def test_compiled_training_is_the_same_training(tmp_path):
    """Without code generation, which would only test the compiler."""
    finished = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.compiler.reset()
        trainer = trainer_for(moefied(dropout=0.0), tmp_path, [LearnedSelectionCallback(5.0)], max_steps=4, **settings)
        trainer.train()
        finished.append(trainer)
    plain, compiled = finished
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-3)
    for key, value in routers_of(plain.model).items():
        torch.testing.assert_close(routers_of(compiled.model)[key], value, rtol=1e-2, atol=1e-3)


def test_half_precision(tmp_path):
    trainer = trainer_for(moefied(), tmp_path, [LearnedSelectionCallback(5.0)], bf16=True)
    trainer.train()
    assert len(losses_of(trainer)) == STEPS and all(loss < 60 for loss in losses_of(trainer))
    assert all(value.dtype == torch.float32 for value in routers_of(trainer.model).values())


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": -1.0}, "eta is a weight and must not be negative, got -1.0"),
        ({"eta": math.nan}, "eta is a weight"),
        ({"eta": 1.0, "lam": -2}, "lam is a weight and must not be negative, got -2"),
        ({"eta": 1.0, "tau": 1.0}, "tau must lie between 0 and 1.*got 1.0"),
        ({"eta": 1.0, "until": 1.5}, "got 1.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LearnedSelectionCallback(**settings)


def test_models_that_cannot_learn_it_are_refused_before_training(tmp_path, monkeypatch):
    def refused(model, message, callbacks=()):
        before = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            trainer_for(model, tmp_path, [*callbacks, LearnedSelectionCallback(1.0)])
        if not callbacks:
            assert [p.requires_grad for p in model.parameters()] == before

    refused(dense_model(), r"convert the model first \(moefy_hf.moefy_\)")
    refused(dense_model(), "a schedule of MoEficationCallback selects", [callback_for([Phase(1.0, split=True)])])
    refused(moefied(router="linear"), "the model has 'linear'.*reroute_")
    refused(moefied(compensation=True), "means of compensation")
    refused(peft.get_peft_model(moefied(), peft.LoraConfig(**LORA)), 'modules_to_save=."router"')
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="FSDP keeps parameters in shards.*DDP"):
        LearnedSelectionCallback(1.0).on_init_end(args, None, None, model=moefied())


def test_older_code_of_a_checkpoint_is_refused_and_still_runs(tmp_path):
    moefied().save_pretrained(tmp_path / "older")
    code = tmp_path / "older" / "routed_activation.py"
    known = code.read_text()
    older = known.replace("        self.soft = False\n", "").replace("if self.weighs:", "if False:")
    code.write_text(older.replace("def weighs", "def was_not_there"))
    assert "self.weighs" not in code.read_text() and code.read_text() != known
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "older", trust_remote_code=True)
    with pytest.raises(ValueError, match="too old to learn a selection.*load"):
        trainer_for(model, tmp_path, [LearnedSelectionCallback(1.0)])
    masked = predictions(model)
    model.set_moe_implementation("torch")
    torch.testing.assert_close(predictions(model), masked, rtol=1e-4, atol=1e-5)
    trainer_for(load(tmp_path / "older"), tmp_path, [LearnedSelectionCallback(1.0)])


def test_routers_that_the_optimizer_lacks_are_found_before_training(tmp_path):
    late = trainer_for(moefied(), tmp_path, [])
    late.add_callback(LearnedSelectionCallback(1.0))
    with pytest.raises(ValueError, match="optimizer does not hold the routers.*callbacks="):
        late.train()
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2, disable_tqdm=True)
    made = Trainer(
        args=args, model_init=lambda: moefied(), train_dataset=Rows(), callbacks=[LearnedSelectionCallback(1.0)]
    )
    with pytest.raises(ValueError, match="model_init= comes too late"):
        made.train()


def test_a_first_stage_longer_than_the_training_is_refused(tmp_path):
    trainer = trainer_for(moefied(), tmp_path, [LearnedSelectionCallback(1.0, until=20)])
    with pytest.raises(ValueError, match="from step 20 to 12 of 12: train longer"):
        trainer.train()
