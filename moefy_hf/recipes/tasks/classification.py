"""Fine-tune an encoder on labelled text, MoEfy it, and measure quality and time against compute.

    moefy train classification --config recipes/configs/quickstart.yaml

Stages, each skipped when its result is there: dense/ (the fine-tuned dense model), moefied/ (the converted model),
sweep.json and sweep.png (quality at several budgets), scores_*.json (--metrics of every model) and times.json (of a
batch, dense and MoEfied). With --recovery_epochs also recovered/ (the converted model, fine-tuned at its budget, or at
one that it learns: --learned_eta), control/ (the dense one, trained for as many steps) and their figures. With
--schedule also scheduled/: the dense model's training once more, in which a MoEficationCallback profiles, splits,
routes and anneals. Any setting of the YAML file can be given on the command line:

    ... --model_name_or_path google-bert/bert-base-uncased --dataset_name stanfordnlp/sst2 --text_column sentence \\
        --test_split validation --k 0.3 --recovery_epochs 1 --distillation_weight 1
"""

from transformers import AutoModelForSequenceClassification

from .. import arguments as of
from ..data import load_texts, load_tokenizer
from ..run import Run
from ..scores import Metrics, classes
from ..settings import Arguments
from ..stages import Stages
from .base import Task, load_dense


def load(arguments: Arguments, stages: Stages) -> Run:
    """Load labelled texts.

    Raises:
        ValueError: bad settings or data.
    """
    tokenizer = load_tokenizer(arguments.model)
    splits, names = load_texts(arguments.data, tokenizer)
    judge = Metrics(arguments[of.MetricArguments].metrics, sample=range(len(names)))

    return Run(
        arguments,
        stages,
        splits,
        names,
        tokenizer,
        AutoModelForSequenceClassification,
        judge,
        predict=classes,
        task_type="SEQ_CLS",
        compute_metrics=judge.of_classes,
    )


TASK = Task(
    __doc__,
    (of.ClassifierArguments, of.TextDataArguments, of.MetricArguments, of.ScheduleArguments),
    load,
    load_dense,
    metric="accuracy",
)
