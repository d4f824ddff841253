"""Callbacks that report a Trainer's logs get the figures of ours, wherever they stand in its list."""

import importlib.util

import pytest
import transformers
from test_callback import FIXED, callback_for, dense_model, trainer_for
from test_learned_selection import moefied
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from moefy_hf import LearnedSelectionCallback, SparsityPenaltyCallback
from moefy_hf.training.figures import FiguresCallback, handler_of


class Reporter(TrainerCallback):
    """Keeps what it is given in `on_log` at that very moment, as trackers do that send it away."""

    def __init__(self):
        self.reported = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.reported.append(dict(logs))


class Integration(Reporter):
    """One that `report_to` makes."""


def trained(folder, ours: list, reporters: list = (), **settings):
    """Train with callbacks: reporters that are added, before ours and after; return the Trainer."""
    first, *rest = ours
    trainer = trainer_for(dense_model(), folder, first, logging_steps=4, **settings)
    handler = trainer.callback_handler
    for each in rest:
        trainer.add_callback(each)
    if reporters:
        before, after = reporters
        handler.callbacks.insert(handler.callbacks.index(first), before)
        trainer.add_callback(after)
    trainer.train()
    return trainer


def losses(entries: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key != "step"} for entry in entries if "loss" in entry]


def test_before_ours_and_after_it_and_made_by_report_to(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "of_this_test", Integration)
    before, after = Reporter(), Reporter()
    moe, sparsity = callback_for(**FIXED), SparsityPenaltyCallback()
    trainer = trained(tmp_path, [moe, sparsity], (before, after), report_to=["of_this_test"])
    made = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Integration))
    history = trainer.state.log_history
    assert before.reported == after.reported == made.reported
    assert losses(before.reported) == losses(history) and len(losses(history)) == 3
    for entry in losses(before.reported):
        assert entry.keys() >= {"loss", "moe_experts", "moe_experts_0", "moe_phase", sparsity.name}
    assert len(before.reported) == len(history)  # each entry once
    assert losses(history)[-1].keys() >= {"moe_captured", "moe_load_entropy", "moe_dead_experts"}


def test_others_keep_their_order_and_ours_theirs(tmp_path):
    moe, sparsity = callback_for(**FIXED), SparsityPenaltyCallback()
    reporters = Reporter(), Reporter()
    trainer = trained(tmp_path, [moe, sparsity], reporters)
    callbacks = trainer.callback_handler.callbacks
    assert callbacks[:2] == [moe, sparsity] and len({*map(id, callbacks)}) == len(callbacks)
    assert not any(isinstance(each, FiguresCallback) for each in callbacks[2:])
    assert isinstance(callbacks[2], transformers.trainer_callback.DefaultFlowCallback)
    assert callbacks.index(reporters[0]) < callbacks.index(reporters[1])


def test_learned_selection(tmp_path):
    model, reporters = moefied(), (Reporter(), Reporter())
    trainer = trainer_for(model, tmp_path, LearnedSelectionCallback(eta=1.0), logging_steps=2, max_steps=4)
    trainer.callback_handler.callbacks.insert(0, reporters[0])
    trainer.add_callback(reporters[1])
    trainer.train()
    assert reporters[0].reported == reporters[1].reported
    assert all({"router_loss", "moe_experts"} <= entry.keys() for entry in losses(reporters[0].reported))
    assert len(losses(reporters[0].reported)) == 2


def test_a_second_training_reports_as_the_first(tmp_path):
    reporters = Reporter(), Reporter()
    trainer = trained(tmp_path, [callback_for(**FIXED)], reporters)
    first = len(reporters[0].reported)
    trainer.train()
    assert reporters[0].reported == reporters[1].reported and len(reporters[0].reported) == 2 * first
    assert all("moe_experts" in entry for entry in losses(reporters[0].reported))


def test_without_a_handler_there_is_nothing_to_move():
    """Whoever calls the events by hand has an order of their own."""
    assert handler_of(SparsityPenaltyCallback()) is None


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_has_the_figures(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = trained(tmp_path, [callback_for(**FIXED)], report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    for name in ("moe_experts", "moe_phase", "loss"):
        logged = {each.step: each.value for each in events.Scalars(f"train/{name}")}
        kept = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        assert logged == pytest.approx(kept) and len(kept) == 3
