"""What every task does: train, convert, measure, recover, publish; each stage once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from ...errors import MoefyError
from .. import arguments as of
from ..given import check_given, take_up
from ..inputs import resolve
from ..plans import training_plan
from ..publishing import publish
from ..run import Run
from ..scores import evaluate_models
from ..settings import Arguments, check, checking, parse
from ..stages import Plan, Stages
from ..steps import compare_budgets, convert, show_sweep
from ..summary import model_folders, summarise
from ..timing import measure_times
from ..training import fine_tune, recover, train_scheduled

Scores = dict[str, dict[str, float]]
SHARED = (  # settings of every task, after its own
    *(of.EvaluationArguments, of.ControlArguments, of.TimingArguments, of.SparsityArguments, of.RecoverArguments),
    *(of.RecoveryArguments, of.DistillationArguments, of.LearnedArguments, of.OutputArguments),
)


def nothing_more(run: Run) -> None:
    """Do nothing after the conversion."""


@dataclass(frozen=True)
class Task:
    """What a task has of its own.

    Attributes:
        about: what `--help` says before the settings.
        own: dataclasses with its settings.
        load: reads and checks the data; the run's output directory is untouched so far.
        make: loads or makes the dense model to begin with.
        metric: how models are judged where no --metrics are named, if the task has metrics.
        training: class of the settings of trainings.
        plan: the stages of a run, and what each reads.
        prepare: leaves the dense model in the run's folder; all processes take part.
        convert_further: what follows the conversion, in the process that writes.
        score: measures every model: "NAME at BUDGET" -> metric -> value.
        percent: whether these are shares.
    """

    about: str
    own: tuple[type, ...]
    load: Callable[[Arguments, Stages], Run]
    make: Callable[[Run], PreTrainedModel]
    metric: str | None = None
    training: type[TrainingArguments] = TrainingArguments
    plan: Callable[[Arguments], Plan] = training_plan
    prepare: Callable[[Run, Callable[[], PreTrainedModel]], Any] = fine_tune
    convert_further: Callable[[Run], None] = nothing_more
    score: Callable[[Run], Scores] = evaluate_models
    percent: bool = True

    @property
    def types(self) -> tuple[type, ...]:
        """All settings of the task."""
        return (*self.own, *SHARED, self.training)


def run(task: Task, words: Sequence[str] | None = None, program: str | None = None) -> dict[str, Any] | None:
    """Run all stages of a task that are not finished.

    Args:
        task: what is done.
        words: its settings, as a command line has them; by default the process'.
        program: what `--help` calls the command; by default the script.

    Returns:
        the scores of every model, the folders of the models, and a table of both; None in a process of several that
        does not write.

    Raises:
        SystemExit: of status 2 and with one line on the error stream, where settings or data are found wrong.
    """
    with checking():
        begun = begin(task, parse(task.types, task.about, words, program=program))
    make, plan = partial(task.make, begun), begun.stages.plan
    if "sweep.json" in plan:
        task.prepare(begun, make)
    if "sweep.json" in plan and begun.writes:  # conversion and measurements are one process' work
        convert(begun)
        begun.stages.run("sweep.json", partial(compare_budgets, begun, "moefied"))
        show_sweep(begun.folder)
        task.convert_further(begun)
    if "recovered" in plan:
        recover(begun)
    if "scheduled" in plan:
        train_scheduled(begun, make)
    if not begun.writes:
        return None
    scores = task.score(begun)
    if "times.json" in plan:
        begun.stages.run("times.json", partial(measure_times, begun))
    publish(begun)
    return {"scores": scores, "models": model_folders(begun), "table": summarise(begun, scores, task.percent)}


def load_dense(run: Run, **kwargs: Any) -> PreTrainedModel:
    """Load the dense model to begin with, with a head for the classes of the data, if they have any."""
    model = run.arguments.model
    return run.auto.from_pretrained(
        resolve(model.model_name_or_path),
        revision=model.model_revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        **(run.labels() if run.names else {}),
        **kwargs,
    )


def begin(task: Task, arguments: Arguments, plan: Plan | None = None) -> Run:
    """Load the data, and find what is wrong with the settings before anything is written; by default for all stages.

    Raises:
        ValueError: bad settings or data, or results of other settings in the output directory.
    """
    training, recovers = arguments[TrainingArguments], arguments.recovers
    arguments[of.DistillationArguments].choose(1.0 if recovers else 0.0)
    if recovers:
        arguments = take_up(arguments)
    elif isinstance(arguments.model, of.ModelArguments) and arguments.model.model_name_or_path is None:
        raise MoefyError("give --model_name_or_path, or --recover with a MoEfied checkpoint")
    if task.metric is not None:
        arguments[of.MetricArguments].choose(task.metric)
    check(arguments)
    stages = Stages(
        str(training.output_dir),
        plan or task.plan(arguments),
        arguments,
        arguments[of.OutputArguments].redo,
    )
    with training.main_process_first(desc="data"):
        begun = task.load(arguments, stages)
        if recovers:
            check_given(begun)
    if training.should_save:
        stages.begin()
    return begun
