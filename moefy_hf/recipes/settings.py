"""Settings of a run: read from YAML files and the command line, and checked before any work."""

import argparse
import atexit
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi
from transformers import HfArgumentParser, TrainingArguments

from ..arguments import add_arguments, as_words, given, read_yaml
from ..config import AUTO, MoEficationConfig, overrule
from ..errors import MoefyError
from ..evaluation.controls import check_control
from ..hub.push import check_repository
from ..modeling.selection import SELECTIONS
from .arguments import ControlArguments, EvaluationArguments, RecoverArguments
from .recovery import check_recovery

T = TypeVar("T")
TRAINING = {field.name for field in fields(TrainingArguments)}
SHOWN = {  # those that --help explains
    *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed"),
    *("weight_decay", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("bf16", "eval_strategy", "save_strategy", "logging_steps", "report_to", "push_to_hub", "hub_model_id"),
}
EPILOG = "Every other setting of transformers.TrainingArguments can be given, too."


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and descriptions as they are written."""


class Arguments:
    """The dataclasses of a run, each found by its class or a base of it.

    Example:
        >>> arguments = parse((ModelArguments, TrainingArguments), "about", ["--model_name_or_path", "owner/name"])
        >>> arguments[ModelArguments].model_name_or_path
        'owner/name'
    """

    def __init__(self, parts: Sequence[Any]):
        self.parts = list(parts)

    def __getitem__(self, cls: type[T]) -> T:
        for part in self.parts:
            if isinstance(part, cls):
                return part
        raise KeyError(cls.__name__)

    def __contains__(self, cls: type) -> bool:
        return any(isinstance(part, cls) for part in self.parts)

    @property
    def model(self) -> Any:
        """The arguments that name the model."""
        return next(part for part in self.parts if hasattr(part, "model_name_or_path"))

    @property
    def data(self) -> Any:
        """The arguments that name the data set."""
        return next(part for part in self.parts if hasattr(part, "dataset_name"))

    @property
    def recovers(self) -> str | None:
        """The MoEfied checkpoint that the run begins with, if it does."""
        return self[RecoverArguments].recover if RecoverArguments in self else None

    def replaced(self, *parts: Any) -> "Arguments":
        """Return these arguments with others in the place of those of the same class."""
        new = {type(part): part for part in parts}
        return Arguments([new.get(type(part), part) for part in self.parts])


def parse(
    types: tuple[type, ...],
    description: str,
    words: Sequence[str] | None = None,
    first_of: Callable[[Arguments], Mapping[str, Any]] = lambda arguments: {},
    program: str | None = None,
) -> Arguments:
    """Read dataclasses and a `MoEficationConfig` from `--config FILE.yaml` and the command line, which wins.

    Args:
        types: dataclasses, as `HfArgumentParser` takes them; a `TrainingArguments` gives the conversion its seed.
        words: instead of the process' command line.
        first_of: settings of the conversion that follow from the other arguments, as the first of a grid's do.
        program: what `--help` calls the command; by default the script.

    Raises:
        MoefyError: an unknown name, or a value out of range.
    """
    atexit.register(leave_processes)
    trains = any(issubclass(each, TrainingArguments) for each in types)
    parser = HfArgumentParser(
        types,  # type: ignore[arg-type]  # a tuple of classes, as it says
        prog=program,
        usage="%(prog)s [--config FILE.yaml ...] [--SETTING VALUE ...]",
        description=description + "\n--config FILE.yaml sets any of these; a later file and the command line win.",
        epilog=EPILOG if trains else None,
        formatter_class=Help,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.dest in TRAINING - SHOWN:
            action.help = argparse.SUPPRESS
    add_arguments(parser, MoEficationConfig, leave_out=("seed",) if trains else ())
    from_files, words = split_files(list(sys.argv[1:] if words is None else words))
    first = ["--ddp_timeout", "21600"] if trains else []  # the others wait while the first process converts
    if trains and not torch.accelerator.is_available():
        first += ["--use_cpu", "true"]  # bf16 training on a CPU must be asked for
    parts = list(parser.parse_args_into_dataclasses([*first, *from_files, *words]))
    said = given(parts.pop(), MoEficationConfig) if isinstance(parts[-1], argparse.Namespace) else {}
    said = overrule(said, {word.partition("=")[0].removeprefix("--") for word in words})
    said["router_settings"] = dict(said.get("router_settings", {}))
    arguments = Arguments(parts)
    if trains:
        said["seed"] = arguments[TrainingArguments].seed
    return Arguments([*parts, MoEficationConfig(**(said | {**first_of(arguments)}))])


def split_files(words: list[str]) -> tuple[list[str], list[str]]:
    """Take `--config FILE.yaml` out of a command line; return the files' settings as words, and the other words."""
    from_files: list[str] = []
    while "--config" in words:
        at = words.index("--config")
        if at + 1 >= len(words):
            raise MoefyError("--config needs a YAML file")
        from_files += as_words(read_yaml(words[at + 1]))
        del words[at : at + 2]
    return from_files, words


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """End the process with status 2 and one line where a setting or an input is found wrong within."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{called()}: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error


def called() -> str:
    """Return what was called: a script, or `moefy train`."""
    return "moefy train" if Path(sys.argv[0]).stem in ("moefy", "__main__") else sys.argv[0]


def leave_processes() -> None:
    """gloo's threads drop their last tensors when they get Python's lock: a process that ends before can abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(1)


def check(arguments: Arguments) -> None:
    """Find bad settings before any work.

    Raises:
        MoefyError: an unknown name or a number out of range.
        PushError: a repository on the Hub that cannot be pushed to.
    """
    arguments[TrainingArguments].remove_unused_columns = False
    check_evaluation(arguments[EvaluationArguments], arguments[ControlArguments], arguments[MoEficationConfig])
    check_recovery(arguments)
    check_push(arguments[TrainingArguments])


def check_evaluation(evaluation: EvaluationArguments, beside: ControlArguments, config: MoEficationConfig) -> None:
    """Check what is to be measured; the control "none" is taken out."""
    beside.controls = [] if beside.controls == ["none"] else beside.controls
    for control in beside.controls:
        check_control(control)
    for kind in evaluation.selections:
        if kind not in SELECTIONS:
            raise MoefyError(f"unknown selection {kind!r}; choose from {', '.join(SELECTIONS)}")
    for budget in evaluation.budgets:
        replace(config, k=budget, threshold=None)


def check_push(training: TrainingArguments) -> None:
    """Find what would stop the push at the end before any work; the Trainer itself pushes nothing.

    Raises:
        MoefyError: no hub_model_id, or one that has no owner.
        PushError: no token, or a repository that holds something else.
    """
    if training.push_to_hub:
        name = training.hub_model_id
        if name is None or "/" not in name:
            raise MoefyError(f"push_to_hub needs hub_model_id, 'owner/name' of the repository; got {name!r}")
        check_repository(HfApi(token=training.hub_token), name, None, False)
        training.push_to_hub = False
    else:
        training.hub_model_id = None


def allocation_of(config: MoEficationConfig) -> str:
    """Return how layers share a budget: the models of recipes have data and a head, as "auto" by sensitivity needs."""
    return "sensitivity" if config.allocation == AUTO else config.allocation
