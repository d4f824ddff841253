"""`MoEficationCallback`: profile, split, route and fine-tune inside any Trainer."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..config import MoEficationConfig
from ..conversion.budgets import COMPARING_PREDICTIONS
from ..conversion.checks import check_convertible, check_predictions, with_allocation
from ..conversion.pipeline import install_routers_
from ..measure.metrics import unwrapped
from ..modeling.moefied import is_moefied
from ..modeling.section import ALL_EXPERTS, Section
from ..modeling.selection_config import count_experts, per_layer
from .distributed import adopt, check_optimizer, split_everywhere_
from .monitor import RoutingMonitor
from .run_hooks import keep_hooks
from .schedule import TARGET, Phase, Timetable, as_dicts, make_schedule

logger = logging.get_logger("moefy_hf")

SHARDED = (
    "{} keeps parameters in shards or copies, and neurons cannot be permuted in those: convert the model first "
    "(moefy_hf.moefy_), save it, and train the converted checkpoint sharded; the callback then only fine-tunes"
)


class MoEficationCallback(TrainerCallback, ExportableState):
    """MoEfies a model while a Trainer trains it.

    When the Trainer is made, routers that select everything are put into the model: its function stays what it was,
    and from then on no parameter appears or goes, so that optimizer, DDP and checkpoints never notice. The schedule
    says at which steps the neurons are split into experts (permuted in place, with what the optimizer remembers of
    them), routers are fitted and budgets measured, and how many experts are computed. All of that follows from the
    step and from what checkpoints hold: a run resumed at any step continues as it would have without interruption.
    Routers are fitted by their own local loss when a phase splits, and are frozen in between. A model that is MoEfied
    already is fine-tuned at the budget it has.

    Args:
        config: how to convert; its selection is the schedule's target.
        calibration: model-ready batches, to be read whenever a phase splits; by default the training set's examples,
            shuffled with the config's seed (the first ones, of an IterableDataset).
        schedule: "one_step", "anneal", "smoe_dropout", "switchable" (`training/schedule.py`), or a list of `Phase`.

    Raises:
        ValueError: an unknown schedule; when the Trainer is made, whatever `moefy_` finds wrong without looking at
            data, and parameters that are kept elsewhere (FSDP, DeepSpeed) in a schedule that splits; when training
            begins, data that cannot be used, an optimizer whose state cannot follow neurons (Adafactor, 8-bit), and a
            schedule or checkpoint that does not fit the run.

    With several processes the first one converts, and the others wait for it: raise `ddp_timeout` for large models.
    """

    def __init__(
        self,
        config: MoEficationConfig | Mapping[str, Any] | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        schedule: str | Sequence[Phase] = "anneal",
    ):
        self.config = MoEficationConfig(**config) if isinstance(config, Mapping) else config or MoEficationConfig()
        if self.config.threshold is not None:
            chosen = self.config.selection_section()
            raise ValueError(f"a schedule spends a budget: give the selection k, not {chosen}")
        if self.config.compensation:
            raise ValueError("training moves the means of compensation: call moefy_hf.compensate_ when it is over")
        self.calibration = calibration
        self.phases = make_schedule(schedule)
        if calibration is not None and iter(calibration) is calibration and self.splits > 1:
            raise ValueError("the schedule splits more than once, so calibration is read again: give no iterator")
        self.follows = True  # False: the model came MoEfied, and stays at its budget
        self.section: dict[str, Any] = {}
        self.monitor = RoutingMonitor()

    @property
    def splits(self) -> int:
        return sum(phase.split for phase in self.phases)

    def state(self) -> dict:
        """What a checkpoint keeps: enough to continue from the step it was written at."""
        settings = {key: value for key, value in self.config.section().items() if key != "format_version"}
        return {
            "args": {"config": settings, "schedule": as_dicts(self.phases)},
            "attributes": {"follows": self.follows, "section": self.section},
        }

    # ---- the Trainer's events

    def on_init_end(self, args, state, control, model, **kwargs):
        if args.n_gpu > 1:
            raise ValueError("MoEfication does not work with DataParallel: use torchrun, or one GPU")
        base = unwrapped(model)
        self.follows = not is_moefied(base) or Section(base.config).splits == 0
        if not self.follows:
            self.section = Section(base.config).values
            return
        if self.splits:
            refuse_sharded(args)
        if base is not model:
            raise ValueError("an adapter cannot follow neurons that are permuted: moefy_ the model before adding it")
        if is_moefied(model):
            self.check_same(Section(model.config).values)
        else:
            check_convertible(model, self.config, True)
            install_routers_(model, self.config.section())
            Section(model.config).splits = 0
        self.section = Section(model.config).values

    def on_train_begin(self, args, state, control, model, optimizer=None, train_dataloader=None, **kwargs):
        model = unwrapped(model)
        if not is_moefied(model):
            raise ValueError(
                "the model has no routers: a Trainer must be made with both model= (model_init= comes too late) and "
                f"callbacks=[{type(self).__name__}(...)]"
            )
        if self.follows or state.global_step:
            timetable = Timetable(self.phases, state.max_steps)
            if state.global_step:
                self.resume(model, state, timetable)
            if self.follows and Section.of_values(self.section).splits < self.splits:
                with random_numbers_kept(args):
                    check_optimizer(model.moe_sites(), optimizer)
                self.check_data(args, model, self.batches(args, train_dataloader))
        self.section = Section(model.config).values
        self.monitor.attach(model, active=not args.torch_compile)
        keep_hooks(model, state, self.monitor.handles)

    def on_step_begin(self, args, state, control, model, optimizer=None, train_dataloader=None, **kwargs):
        if self.follows:
            self.follow(args, state, unwrapped(model), optimizer, train_dataloader)
        step = state.global_step + 1
        often = args.logging_strategy != "steps" or (step == 1 and args.logging_first_step)
        self.monitor.watching = often or step % max(int(state.logging_steps), 1) == 0

    def on_step_end(self, args, state, control, **kwargs):
        self.monitor.watching = False

    def follow(self, args, state, model: PreTrainedModel, optimizer, train_dataloader) -> None:
        """Do what the schedule has for the step that begins."""
        timetable = Timetable(self.phases, state.max_steps)
        phase = timetable.begins_at(state.global_step)
        if phase is not None:
            number = f"{timetable.at(state.global_step) + 1} of {len(self.phases)}"
            say(args, state, f"phase {number} begins: {phase.name or 'no name'}")
        owed = timetable.splits_until(state.global_step)  # also where a run goes on with fewer steps than it began
        if owed > Section.of_values(self.section).splits:
            with random_numbers_kept(args):
                batches, progress = self.batches(args, train_dataloader), not args.disable_tqdm
                config = with_allocation(self.config, model, True)
                say(args, state, split_everywhere_(model, config, batches, optimizer, progress))
            Section.of_values(self.section).splits = owed
        self.select(model, timetable.share(state.global_step, self.target(model)))

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            figures = self.monitor.figures()
            if self.follows:
                step = max(state.global_step - 1, 0)  # the last one that was taken
                figures["moe_phase"] = Timetable(self.phases, state.max_steps).at(step) + 1
            logs.update(figures)
            state.log_history[-1].update(figures)  # written before callbacks are asked

    def on_train_end(self, args, state, control, model, **kwargs):
        model = unwrapped(model)
        self.monitor.detach()
        if not self.follows:
            return
        best = Path(state.best_model_checkpoint or "", "config.json")
        if args.load_best_model_at_end and state.best_model_checkpoint and best.exists():
            adopt(model, Section.of_file(best).values)  # its weights expect its own budget
            self.section = Section(model.config).values
        elif state.global_step >= state.max_steps and Section.of_values(self.section).splits:
            self.select(model, Timetable(self.phases, state.max_steps).share(state.max_steps, self.target(model)))
        if self.splits and not Section.of_values(self.section).splits:
            logger.warning("the model that training ends with is dense: its neurons were not split yet")
        say(args, state, f"training ends with {describe(model)}")

    # ---- what they come to

    def resume(self, model: PreTrainedModel, state, timetable: Timetable) -> None:
        """Take up what the checkpoint says of routing; the Trainer has loaded weights and optimizer."""
        saved = state.stateful_callbacks.setdefault(type(self).__name__, None)
        if saved is not None:
            if saved["attributes"]["follows"]:
                self.check_same(saved["attributes"]["section"])
            self.follows = saved["attributes"]["follows"]
            adopt(model, saved["attributes"]["section"])
            self.section = Section(model.config).values
        elif self.follows and timetable.splits_until(state.global_step - 1):
            raise ValueError(
                f"the checkpoint of step {state.global_step} was written without a {type(self).__name__}, and the "
                "schedule would have split the neurons before: start from the checkpoint's model instead of resuming"
            )
        state.stateful_callbacks[type(self).__name__] = self.state()

    def check_same(self, section: Mapping[str, Any]) -> None:
        """Routers were made with these settings."""
        made = Section.of_values(section)
        for name in ("num_experts", "expert_size", "router", "router_settings", "layers", "shared_experts"):
            ours, theirs = getattr(self.config, name), getattr(made, name)
            if ours != theirs:
                raise ValueError(
                    f"the model has routers already, made with {name}={theirs!r}; the callback's config says "
                    f"{ours!r}: use the same, or start from a dense model"
                )

    def batches(self, args, train_dataloader: DataLoader) -> Iterable[Mapping[str, Any]]:
        if self.calibration is not None:
            return self.calibration
        return training_batches(args, train_dataloader, self.config.seed)

    def check_data(self, args, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> None:
        """Find out before training, not when the schedule gets there, that a model's predictions cannot be used."""
        compared = with_allocation(self.config, model, True).allocation in COMPARING_PREDICTIONS
        if compared and iter(batches) is not batches:  # an iterator is read once
            with random_numbers_kept(args):
                check_predictions(model, [batch for batch, _ in zip(batches, range(1), strict=False)])

    def target(self, model: PreTrainedModel) -> float:
        """The average share of experts that the configured selection computes."""
        experts = [site.act.num_experts for site in model.moe_sites()]
        ks = per_layer("k", self.config.k, len(experts))
        counts = [count_experts(k, e, self.config.shared_experts) for k, e in zip(ks, experts, strict=True)]
        return sum(counts) / sum(experts)

    def select(self, model: PreTrainedModel, share: float | str) -> None:
        """Compute this share of the experts on average, or the target."""
        section, wanted = Section(model.config), self.config.selection_section()
        wanted.setdefault("allocation", "sensitivity" if section.measured("sensitivity") else "uniform")
        if share == 1.0:
            wanted = dict(ALL_EXPERTS)
        elif share != TARGET:
            wanted["k"] = share
        if wanted != section.selection:
            model.set_selection(**wanted)


def describe(model: PreTrainedModel) -> str:
    counts = [f"{site.act.k:.3g} of {site.act.num_experts}" for site in model.moe_sites()]
    return f"experts per FFN: {', '.join(dict.fromkeys(counts))}"


def say(args, state, text: str) -> None:
    if state.is_world_process_zero and not args.disable_tqdm:
        tqdm.write(f"[moefy_hf] step {state.global_step}: {text}")


def refuse_sharded(args: TrainingArguments, why: str = SHARDED) -> None:
    """
    Raises:
        ValueError: parameters are going to be sharded; `why` that cannot be, with a place for what shards them.
    """
    if setting(args.fsdp, "ACCELERATE_USE_FSDP"):
        raise ValueError(why.format("FSDP"))
    if setting(args.deepspeed, "ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(why.format("DeepSpeed"))


def setting(argument: Any, variable: str) -> bool:
    """Whether a Trainer's argument or what `accelerate launch` sets asks for something."""
    return bool(argument) or os.environ.get(variable, "false").lower() in ("1", "true")


def random_numbers_kept(args) -> Any:
    """What happens within does not change the random numbers that the training goes on with."""
    return torch.random.fork_rng([args.device] if args.device.type == "cuda" else [])


def training_batches(args, train_dataloader: DataLoader, seed: int) -> DataLoader:
    """The training examples in an order of their own: the same whenever it is asked for, whatever has been read."""
    dataset = train_dataloader.dataset
    return DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=not isinstance(dataset, IterableDataset),
        collate_fn=train_dataloader.collate_fn,
        generator=torch.Generator().manual_seed(seed),
    )
