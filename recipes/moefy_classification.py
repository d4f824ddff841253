# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots]"]
# ///
"""Fine-tune an encoder on labelled text, MoEfy it, and measure quality and time against compute.

    accelerate launch recipes/moefy_classification.py --config recipes/configs/quickstart.yaml

Stages, each skipped when its result is there: dense/ (the fine-tuned dense model), moefied/ (the converted model),
sweep.json and sweep.png (quality at several budgets), scores_*.json (--metrics of every model) and times.json (of a
batch, dense and MoEfied). With --recovery_epochs also recovered/ (the converted model, fine-tuned at its budget, or at
one that it learns: --learned_eta), control/ (the dense one, trained for as many steps) and their figures. With
--schedule also scheduled/: the dense model's training once more, in which a MoEficationCallback profiles, splits,
routes and anneals. Any setting of the YAML file can be given on the command line:

    ... --model_name_or_path google-bert/bert-base-uncased --dataset_name stanfordnlp/sst2 --text_column sentence \\
        --test_split validation --k 0.3 --recovery_epochs 1 --distillation_weight 1
"""

from functools import partial

from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments

from moefy_hf.recipes import arguments as of
from moefy_hf.recipes.data import Batches, load_texts, load_tokenizer
from moefy_hf.recipes.inputs import resolve
from moefy_hf.recipes.plans import training_plan
from moefy_hf.recipes.publishing import publish
from moefy_hf.recipes.run import Run
from moefy_hf.recipes.scores import Metrics, classes, evaluate_models
from moefy_hf.recipes.settings import Arguments, check, checking, parse
from moefy_hf.recipes.stages import Plan, Stages
from moefy_hf.recipes.steps import compare_budgets, convert, show_sweep
from moefy_hf.recipes.summary import summarise
from moefy_hf.recipes.timing import measure_times
from moefy_hf.recipes.training import fine_tune, recover, train_scheduled

TYPES = (
    *(of.ClassifierArguments, of.TextDataArguments, of.EvaluationArguments, of.ControlArguments),
    *(of.MetricArguments, of.TimingArguments, of.SparsityArguments, of.RecoveryArguments),
    *(of.DistillationArguments, of.LearnedArguments, of.ScheduleArguments, of.OutputArguments, TrainingArguments),
)


def main() -> None:
    with checking():
        run = begin(parse(TYPES, __doc__))
    make = partial(make_model, run)
    fine_tune(run, make)
    if run.writes:  # conversion and measurements are one process' work
        convert(run)
        run.stages.run("sweep.json", partial(compare_budgets, run, "moefied"))
        show_sweep(run.folder)
    if "recovered" in run.stages.plan:
        recover(run)
    if "scheduled" in run.stages.plan:
        train_scheduled(run, make)
    if run.writes:
        scores = evaluate_models(run)
        if "times.json" in run.stages.plan:
            run.stages.run("times.json", partial(measure_times, run))
        publish(run)
        print(summarise(run, scores))


def begin(arguments: Arguments, plan: Plan | None = None) -> Run:
    """Load texts, and find what is wrong with the settings before anything is written; by default for all stages.

    Raises:
        ValueError: bad settings or data, or results of other settings in the output directory.
    """
    metrics = arguments[of.MetricArguments]
    metrics.choose("accuracy")
    training = arguments[TrainingArguments]
    check(arguments)
    plan, redo = plan or training_plan(arguments), arguments[of.OutputArguments].redo
    stages = Stages(training.output_dir, plan, arguments, redo)
    tokenizer = load_tokenizer(arguments.model)
    with training.main_process_first(desc="tokenisation"):
        splits, names = load_texts(arguments.data, tokenizer)
    judge = Metrics(metrics.metrics, sample=range(len(names)))
    if training.should_save:
        stages.begin()

    def batches(rows, shuffle, seed):
        return Batches(rows, tokenizer, shuffle=shuffle, seed=seed)

    return Run(
        arguments,
        stages,
        splits,
        names,
        tokenizer,
        AutoModelForSequenceClassification,
        batches,
        judge,
        predict=classes,
        task_type="SEQ_CLS",
        compute_metrics=judge.of_classes,
    )


def make_model(run: Run) -> PreTrainedModel:
    """Load the dense model to fine-tune."""
    model = run.arguments.model
    return AutoModelForSequenceClassification.from_pretrained(
        resolve(model.model_name_or_path),
        revision=model.model_revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        **run.labels(),
    )


if __name__ == "__main__":
    main()
