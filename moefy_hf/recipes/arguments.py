"""Arguments of the recipes, as dataclasses: each is what some stage of a run reads, and is cached by."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..evaluation.controls import BASELINES, CONTROLS
from ..modeling.selection import SELECTIONS

INPUT = "Hub id, local directory, or package:NAME (python -m moefy_hf.recipes.inputs --list)"
DATASET = "Hub id, local directory of csv, jsonl or parquet files, or package:NAME"


def about(help: str, default):
    """Make a field with a help text; lists are copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def needed(help: str):
    """Make a field without a default."""
    return field(metadata={"help": help})


class Group:
    """Settings that `--help` shows together, under the first line of their class' docstring."""

    _argument_group_name: ClassVar[str]  # which HfArgumentParser reads

    def __init_subclass__(cls) -> None:
        cls._argument_group_name = (cls.__doc__ or cls.__name__).partition("\n")[0].rstrip(".")


# ---- models


@dataclass
class ModelArguments(Group):
    """The dense model to start from."""

    model_name_or_path: str | None = about(f"{INPUT}; needed without --recover", None)
    model_revision: str = about("branch, tag or commit on the Hub", "main")
    dtype: str = about("dtype the weights are loaded in", "float32")
    attn_implementation: str | None = about("attention implementation", None)
    trust_remote_code: bool = about("run modeling code that comes with the model", False)


@dataclass
class ClassifierArguments(ModelArguments):
    """The dense model to fine-tune."""

    activation: str | None = about("swap the FFN activation for this one before training, e.g. relu", None)
    frozen: list[str] = about("parameters with one of these in their name are not fine-tuned, e.g. embeddings", [])


@dataclass
class Seq2SeqModelArguments(Group):
    """The dense encoder-decoder to start from."""

    model_name_or_path: str | None = about("Hub id or local directory; nothing trains a new T5", None)
    model_revision: str = about("branch, tag or commit on the Hub", "main")
    tokenizer_name: str | None = about("Hub id, local directory or package:NAME; by default the model's", None)
    config_overrides: str = about("sizes of a new T5: d_model=128,d_ff=512,num_layers=3", "")
    activation: str | None = about("swap the FFN activation for this one before training, e.g. relu", None)


@dataclass
class ImageModelArguments(Group):
    """The dense vision model to start from."""

    model_name_or_path: str | None = about("Hub id or local directory; nothing trains a new model", None)
    model_revision: str = about("branch, tag or commit on the Hub", "main")
    model_type: str = about("architecture of a new model", "vit")
    config_overrides: str = about("sizes of a new model: hidden_size=192,num_hidden_layers=6,...", "")
    trust_remote_code: bool = about("run modeling code that comes with the model", False)
    activation: str | None = about("swap the FFN activation for this one before training, e.g. relu", None)


# ---- data


@dataclass
class DatasetArguments(Group):
    """A data set with splits."""

    dataset_name: str = needed(DATASET)
    dataset_config_name: str | None = about("configuration of a Hub dataset", None)
    validation_split: str = about("name of the validation split", "validation")
    test_split: str = about("name of the test split", "test")


@dataclass
class TextDataArguments(DatasetArguments):
    """Labelled text."""

    text_column: str = about("column with the text", "text")
    label_column: str = about("column with the label", "label")
    max_seq_length: int = about("longer texts are cut to so many tokens", 128)
    max_train_samples: int | None = about("train on so many rows (seeded)", None)
    max_eval_samples: int | None = about("measure on so many rows of validation and test each (seeded)", None)


@dataclass
class TokenDataArguments(DatasetArguments):
    """Texts with a tag for each word, in columns or in the files of CoNLL."""

    dataset_name: str = needed(
        f"{DATASET}; or directory of train.txt, validation.txt, ...: a word and its tag in a line"
    )
    tokens_column: str = about("column with the words, a list or a text with spaces", "tokens")
    tags_column: str = about("column with their tags", "tags")
    max_seq_length: int = about("longer texts are cut to so many tokens", 128)
    max_train_samples: int | None = about("train on so many rows (seeded)", None)
    max_eval_samples: int | None = about("measure on so many rows of validation and test each (seeded)", None)


@dataclass
class QuestionDataArguments(DatasetArguments):
    """Questions whose answers are spans of a text, as in SQuAD."""

    dataset_name: str = needed(f"{DATASET}; or directory of SQuAD's json files")
    context_column: str = about("column with the text", "context")
    question_column: str = about("column with the question", "question")
    answers_column: str = about(
        "column with the answers, {text: [...], answer_start: [...]}; none if empty", "answers"
    )
    max_seq_length: int = about("tokens of a question with a window of the text", 384)
    doc_stride: int = about("tokens that neighbouring windows share", 128)
    max_answer_length: int = about("longer spans, in tokens, are no answers", 30)
    max_train_samples: int | None = about("train on so many rows (seeded)", None)
    max_eval_samples: int | None = about("measure on so many rows of validation and test each (seeded)", None)


@dataclass
class PairDataArguments(DatasetArguments):
    """Pairs of texts."""

    source_column: str = about("column with the input", "text")
    target_column: str = about("column with the output, text", "label")
    source_prefix: str = about("put before every input", "")
    max_source_length: int = about("longer inputs are cut to so many tokens", 64)
    max_target_length: int = about("longer outputs are cut to so many tokens", 16)


@dataclass
class ImageDataArguments(DatasetArguments):
    """Labelled images."""

    image_column: str = about("column with the image", "image")
    label_column: str = about("column with the label, a ClassLabel", "label")
    validation_split: str = about("name of the validation split; a tenth of train where there is none", "validation")
    max_train_samples: int | None = about("train on so many rows (seeded)", None)


@dataclass
class ProseDataArguments(Group):
    """Texts to calibrate and train on."""

    dataset_name: list[str] = needed("Hub ids, local .txt files, directories of .txt, csv or parquet, or package:NAME")
    dataset_config_name: str | None = about("configuration of a Hub dataset", None)
    text_column: str = about("column with the text", "text")
    train_split: str = about("name of the training split", "train")
    streaming: bool = about("read no more of the texts than is used", False)
    max_seq_length: int = about("tokens of a block", 512)
    train_tokens: int = about("tokens of the training texts; recovery_epochs are passes over them", 500_000)


@dataclass
class HeldOutArguments(Group):
    """Texts to measure on."""

    held_out_name: list[str] = about("like dataset_name, or none; by default the other splits of dataset_name", [])
    held_out_splits: list[str] = about(
        "splits of the first dataset_name to measure on, where there is no held_out_name", ["validation", "test"]
    )
    held_out_tokens: int = about("tokens of each text to measure on", 4096)


# ---- measurements


@dataclass
class EvaluationArguments(Group):
    """What is measured of every MoEfied model."""

    budgets: list[float] = about("shares of the experts to measure at", [0.05, 0.1, 0.2, 0.3])
    selections: list[str] = about(
        f"types of selection to measure at the same average share: {', '.join(SELECTIONS)}", ["top_k"]
    )


@dataclass
class ControlArguments(Group):
    """What stands beside the converted model."""

    controls: list[str] = about(f"of {', '.join((*CONTROLS, *BASELINES))}; or none", ["oracle", "random"])


@dataclass
class MetricArguments(Group):
    """Metrics of the library evaluate."""

    metrics: list[str] = about(
        "metrics of evaluate.load: an id on the Hub or a local module, with settings like f1:average=macro; "
        "accuracy, exact_match, seqeval and squad come with this package and need no network; by default what suits "
        "the task; or none",
        [],
    )

    def choose(self, default: str) -> None:
        """Put the metric that suits the task where none was named, and nothing for "none"."""
        self.metrics = {(): [default], ("none",): []}.get(tuple(self.metrics), self.metrics)


@dataclass
class TimingArguments(Group):
    """How long a batch takes, dense and MoEfied."""

    timed_batches: int = about("held-out batches to time on this machine; 0 times nothing", 8)


@dataclass
class GenerationArguments(Group):
    """Targets that models generate."""

    generated_rows: int = about("rows of validation and test to generate for", 200)


@dataclass
class ContinuationArguments(Group):
    """Texts that models go on with."""

    generated_rows: int = about("beginnings of held-out blocks that are continued", 4)
    generated_tokens: int = about("tokens of a continuation, and of its beginning", 40)


@dataclass
class ExportArguments(Group):
    """The converted model in an architecture that serving engines know."""

    export: bool = about("also write a served architecture, where that is exact", True)


# ---- trainings


@dataclass
class SparsityArguments(Group):
    """A penalty in every training."""

    sparsity_penalty: str | None = about("square_hoyer, l1 or density", None)
    sparsity_weight: float = about("factor of that penalty", 0.0)


@dataclass
class RecoverArguments(Group):
    """A recovery alone."""

    recover: str | None = about(
        "Hub id or local directory of a MoEfied checkpoint, instead of a model: fine-tune it at its own budget, "
        "taught by its dense self, for recovery_epochs (by default 1) or max_steps; output_dir/recovered gets it",
        None,
    )


@dataclass
class RecoveryArguments(Group):
    """Training after conversion, beside the dense model for as many steps."""

    recovery_epochs: float = about(
        "fine-tune the converted model for so many epochs, and the dense one beside it", 0.0
    )
    recovery_parameters: str = about("what that trains: all, down (the paper's calibration), lora", "all")
    lora_rank: int = about("rank of the LoRA on every Linear, merged afterwards", 16)


@dataclass
class DistillationArguments(Group):
    """The dense model as a teacher."""

    distillation_weight: float | None = about(
        "in recovery and schedule: weight of the divergence from the dense model; by default 1 with --recover, else 0",
        None,
    )

    def choose(self, default: float) -> None:
        """Put a weight where none was given."""
        if self.distillation_weight is None:
            self.distillation_weight = default


@dataclass
class LearnedArguments(Group):
    """A selection that recovery learns (LTE)."""

    learned_eta: float | None = about(
        "in recovery: learn how many experts each token needs, with this weight of the efficiency penalty, instead of "
        "a fixed budget; needs router sigmoid",
        None,
    )
    learned_tau: float | None = about(
        "with learned_eta: experts with at least this routing weight run; 0.5 by default", None
    )


@dataclass
class ScheduleArguments(Group):
    """A conversion within the dense training."""

    schedule: str | None = about(
        "also MoEfy while training, from what the dense model began with and for as long: one_step, anneal, "
        "smoe_dropout or switchable",
        None,
    )


@dataclass
class OutputArguments(Group):
    """What becomes of earlier results."""

    redo: bool = about("run finished stages again", False)
