"""`MoEficationCallback`: profile, split, route and fine-tune inside any Trainer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..config import MoEficationConfig
from ..conversion.budgets import COMPARING_PREDICTIONS
from ..conversion.checks import check_convertible, check_predictions, with_allocation
from ..conversion.pipeline import install_alone_
from ..errors import MoefyError, UnsupportedModel
from ..loading import MoefiedModel
from ..measure.metrics import unwrapped
from ..modeling.moefied import is_moefied
from ..modeling.section import ALL_EXPERTS, Section
from ..modeling.selection_config import count_experts, per_layer
from .distributed import check_optimizer, replace_section_, split_everywhere_
from .figures import FiguresCallback
from .monitor import RoutingMonitor
from .schedule import TARGET, Phase, Timetable, as_dicts, make_schedule
from .trainer_tools import announce, preserve_random_state, refuse_sharded, track_hooks, training_batches

logger = logging.get_logger("moefy_hf")


class MoEficationCallback(FiguresCallback, ExportableState):
    """MoEfies a model while a Trainer trains it.

    When the Trainer is made, routers that select every expert are put into the model, which computes what it did
    before. From then on no parameter appears or goes, so optimizer, DDP and checkpoints never notice.

    The schedule says at which steps the neurons are split into experts, and how many experts are computed. A split
    permutes neurons in place, with the optimizer's state of them, fits the routers by their own local loss, and
    measures budgets. Routers are frozen in between. All of this follows from the step and from what checkpoints hold:
    a run resumed at any step continues as it would have without interruption.

    A model that is MoEfied already is fine-tuned at the budget it has. With several processes the first one converts,
    and the others wait for it: raise `ddp_timeout` for large models.

    Args:
        config: how to convert, as `MoEficationConfig` or its fields; its budget is what the schedule calls "target".
        calibration: model-ready batches, read whenever a phase splits. By default they are the training set's
            examples, shuffled with the config's seed (the first ones, of an IterableDataset).
        schedule: "one_step", "anneal", "smoe_dropout", "switchable" (`training/schedule.py`), or a list of `Phase`.

    Raises:
        MoefyError: an unknown schedule, a threshold instead of a budget, or compensation. When the Trainer is made:
            whatever `moefy_` finds wrong without looking at data, and parameters that are kept elsewhere (FSDP,
            DeepSpeed) in a schedule that splits. When training begins: data that cannot be used, an optimizer whose
            state cannot follow neurons (Adafactor, 8-bit), and a schedule or checkpoint that does not fit the run.

    Example:
        >>> callback = MoEficationCallback(MoEficationConfig(k=0.25), schedule="anneal")
        >>> Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
    """

    def __init__(
        self,
        config: MoEficationConfig | Mapping[str, Any] | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        schedule: str | Sequence[Phase] = "anneal",
    ):
        self.config = MoEficationConfig(**config) if isinstance(config, Mapping) else config or MoEficationConfig()
        if self.config.threshold is not None:
            selection = self.config.selection_section()
            raise MoefyError(f"a schedule spends a budget: give the selection k, not {selection}")
        if self.config.compensation:
            raise MoefyError("training moves the means of compensation: call moefy_hf.compensate_ when it is over")
        self.calibration = calibration
        self.phases = make_schedule(schedule)
        if calibration is not None and iter(calibration) is calibration and self.num_splits > 1:
            raise MoefyError("the schedule splits more than once, so calibration is read again: give no iterator")
        self.follows = True  # False: the model came MoEfied, and stays at its budget
        self.section: dict[str, Any] = {}
        self.monitor = RoutingMonitor()

    @property
    def num_splits(self) -> int:
        """Return the number of phases that split."""
        return sum(phase.split for phase in self.phases)

    @property
    def splits_done(self) -> int:
        """Return the number of splits so far, of a model that follows the schedule."""
        return cast(int, Section.of_values(self.section).splits)  # None only where the model came MoEfied

    def state(self) -> dict:
        """Return what a checkpoint stores: enough to continue from the step it was written at."""
        settings = {key: value for key, value in self.config.section().items() if key != "format_version"}
        return {
            "args": {"config": settings, "schedule": as_dicts(self.phases)},
            "attributes": {"follows": self.follows, "section": self.section},
        }

    # ---- the Trainer's events

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if args.n_gpu > 1:
            raise MoefyError("MoEfication does not work with DataParallel: use torchrun, or one GPU")
        base = unwrapped(model)
        self.follows = not is_moefied(base) or Section(base.config).splits == 0
        if not self.follows:
            self.section = Section(base.config).values
            return
        if self.num_splits:
            refuse_sharded(args)
        if base is not model:
            raise UnsupportedModel(
                "an adapter cannot follow neurons that are permuted: moefy_ the model before adding it"
            )
        if is_moefied(model):
            self.check_same(Section(model.config).values)
        else:
            sites, _ = check_convertible(model, self.config, True)
            install_alone_(model, self.config, sites)
            Section(model.config).splits = 0
        self.section = Section(model.config).values

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        super().on_train_begin(args, state, control)
        model = unwrapped(model)
        if not is_moefied(model):
            raise MoefyError(
                "the model has no routers: a Trainer must be made with both model= (model_init= comes too late) and "
                f"callbacks=[{type(self).__name__}(...)]"
            )
        if self.follows or state.global_step:
            timetable = Timetable(self.phases, state.max_steps)
            if state.global_step:
                self.resume(model, state, timetable)
            if self.follows and self.splits_done < self.num_splits:
                with preserve_random_state(args):
                    check_optimizer(model.moe_sites(), optimizer)
                self.check_data(args, model, self.batches(args, train_dataloader))
        self.section = Section(model.config).values
        self.monitor.attach(model, active=not args.torch_compile)
        track_hooks(model, state, self.monitor.handles)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        if self.follows:
            self.follow(args, state, unwrapped(model), optimizer, train_dataloader)
        step = state.global_step + 1
        always = args.logging_strategy != "steps" or (step == 1 and args.logging_first_step)
        self.monitor.watching = always or step % max(int(state.logging_steps), 1) == 0

    def on_step_end(self, args, state, control, **kwargs):
        self.monitor.watching = False

    def follow(self, args, state, model: MoefiedModel, optimizer, train_dataloader) -> None:
        """Split and select as the schedule says for the step that begins.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state.
            model: the model without wrappers.
            optimizer: whose state follows the neurons.
            train_dataloader: source of calibration data where none was given.

        Raises:
            MoefyError: calibration data that cannot be used.
        """
        timetable = Timetable(self.phases, state.max_steps)
        phase = timetable.begins_at(state.global_step)
        if phase is not None:
            number = f"{timetable.at(state.global_step) + 1} of {len(self.phases)}"
            announce(args, state, f"phase {number} begins: {phase.name or 'no name'}")
        # also where a run goes on with fewer steps than it began
        splits_due = timetable.splits_until(state.global_step)
        if splits_due > self.splits_done:
            with preserve_random_state(args):
                batches, progress = self.batches(args, train_dataloader), not args.disable_tqdm
                config = with_allocation(self.config, model, True)
                announce(args, state, split_everywhere_(model, config, batches, optimizer, progress))
            Section.of_values(self.section).splits = splits_due
        self.select(model, timetable.share(state.global_step, self.configured_share(model)))

    def figures(self, args, state) -> dict[str, float]:
        figures = self.monitor.figures()
        if self.follows:
            step = max(state.global_step - 1, 0)  # the last one that was taken
            figures["moe_phase"] = Timetable(self.phases, state.max_steps).at(step) + 1
        return figures

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model = unwrapped(model)
        self.monitor.detach()
        if not self.follows:
            return
        best = Path(state.best_model_checkpoint or "", "config.json")
        if args.load_best_model_at_end and state.best_model_checkpoint and best.exists():
            section = cast(Section, Section.of_file(best))  # checkpoints of this training are MoEfied
            replace_section_(model, section.values)  # the best weights expect their own budget
            self.section = Section(model.config).values
        elif state.global_step >= state.max_steps and Section.of_values(self.section).splits:
            timetable = Timetable(self.phases, state.max_steps)
            self.select(model, timetable.share(state.max_steps, self.configured_share(model)))
        if self.num_splits and not Section.of_values(self.section).splits:
            logger.warning("the model that training ends with is dense: its neurons were not split yet")
        announce(args, state, f"training ends with {describe(model)}")

    # ---- what the events do

    def resume(self, model: MoefiedModel, state, timetable: Timetable) -> None:
        """Route as the checkpoint says that a run resumes from; its weights and optimizer are loaded already.

        Args:
            model: the model without wrappers.
            state: the Trainer's state, which holds what `state` returned when the checkpoint was written.
            timetable: of the run.

        Raises:
            MoefyError: routers were made with other settings, or the checkpoint lacks this callback's state.
        """
        saved = state.stateful_callbacks.setdefault(type(self).__name__, None)
        if saved is not None:
            if saved["attributes"]["follows"]:
                self.check_same(saved["attributes"]["section"])
            self.follows = saved["attributes"]["follows"]
            replace_section_(model, saved["attributes"]["section"])
            self.section = Section(model.config).values
        elif self.follows and timetable.splits_until(state.global_step - 1):
            raise MoefyError(
                f"the checkpoint of step {state.global_step} was written without a {type(self).__name__}, and the "
                "schedule would have split the neurons before: start from the checkpoint's model instead of resuming"
            )
        state.stateful_callbacks[type(self).__name__] = self.state()

    def check_same(self, section: Mapping[str, Any]) -> None:
        """Check that routers were made with the settings of the callback's config.

        Args:
            section: of the model that has the routers.

        Raises:
            MoefyError: a setting differs.
        """
        present = Section.of_values(section)
        for name in ("num_experts", "expert_size", "router", "router_settings", "towers", "layers", "shared_experts"):
            configured, made = getattr(self.config, name), getattr(present, name)
            if configured != made:
                raise MoefyError(
                    f"the model has routers already, made with {name}={made!r}; the callback's config says "
                    f"{configured!r}: use the same, or start from a dense model"
                )

    def batches(self, args, train_dataloader: DataLoader) -> Iterable[Mapping[str, Any]]:
        """Return the calibration data: what was given, or the training set's examples."""
        if self.calibration is not None:
            return self.calibration
        return training_batches(args, train_dataloader, self.config.seed)

    def check_data(self, args, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> None:
        """Check before training what else a split would find late: that predictions can be used, where it needs them.

        Args:
            args: the Trainer's arguments.
            model: the model without wrappers.
            batches: calibration data; one batch is read, and none of an iterator.

        Raises:
            MoefyError: the model's predictions cannot be used.
        """
        compares = with_allocation(self.config, model, True).allocation in COMPARING_PREDICTIONS
        if compares and iter(batches) is not batches:  # an iterator is read once
            with preserve_random_state(args):
                check_predictions(model, [batch for batch, _ in zip(batches, range(1), strict=False)])

    def configured_share(self, model: MoefiedModel) -> float:
        """Return the average share of experts that the config's budget computes, in (0, 1]."""
        experts = [site.act.num_experts for site in model.moe_sites()]
        ks = per_layer("k", self.config.k, len(experts))
        counts = [count_experts(k, e, self.config.shared_experts) for k, e in zip(ks, experts, strict=True)]
        return sum(counts) / sum(experts)

    def select(self, model: MoefiedModel, share: float | str) -> None:
        """Select a share of the experts, on average.

        Args:
            model: the model without wrappers.
            share: average share of experts in (0, 1], or "target" for the config's budget.
        """
        section, selection = Section(model.config), self.config.selection_section()
        selection.setdefault("allocation", "sensitivity" if section.measured("sensitivity") else "uniform")
        if share == 1.0:
            selection = dict(ALL_EXPERTS)
        elif share != TARGET:
            selection["k"] = share
        if selection != section.selection:
            model.set_selection(**selection)


def describe(model: MoefiedModel) -> str:
    """Return a line that says how many experts each FFN computes."""
    counts = [f"{site.act.k:.3g} of {site.act.num_experts}" for site in model.moe_sites()]
    return f"experts per FFN: {', '.join(dict.fromkeys(counts))}"
