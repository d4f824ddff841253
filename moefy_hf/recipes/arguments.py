"""Arguments of the recipes, as dataclasses: each is what some stage of a run reads, and is cached by."""

from dataclasses import dataclass

from ..evaluation.controls import BASELINES, CONTROLS
from ..modeling.selection import SELECTIONS
from .data_arguments import DatasetArguments as DatasetArguments
from .data_arguments import Group, about
from .data_arguments import HeldOutArguments as HeldOutArguments
from .data_arguments import ImageDataArguments as ImageDataArguments
from .data_arguments import PairDataArguments as PairDataArguments
from .data_arguments import ProseDataArguments as ProseDataArguments
from .data_arguments import QuestionDataArguments as QuestionDataArguments
from .data_arguments import TextDataArguments as TextDataArguments
from .data_arguments import TokenDataArguments as TokenDataArguments

INPUT = "Hub id, local directory, or package:NAME (python -m moefy_hf.recipes.inputs --list)"


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
