"""Fine-tune an encoder on labelled text, MoEfy it, and measure quality against compute.

    accelerate launch recipes/moefy_classification.py --config recipes/configs/minilm_movie/moefication.yaml

Stages, each skipped when its result is there: dense/ (the fine-tuned dense model), moefied/ (the converted model),
sweep.json and sweep.png (quality at several budgets). With --recovery_epochs also recovered/ (the converted model,
fine-tuned at its budget, or at one that it learns: --learned_eta), control/ (the dense one, trained for as many steps)
and their figures. With --schedule also scheduled/: the dense model's training once more, in which a
MoEficationCallback profiles, splits, routes and anneals.
Any setting of the YAML file can be given on the command line:

    ... --model_name_or_path google-bert/bert-base-uncased --dataset_name stanfordnlp/sst2 --text_column sentence \\
        --test_split validation --share 0.3 --recovery_epochs 1 --distillation_weight 1
"""

from functools import partial

import real_inputs
from common import (
    Batches,
    DataArguments,
    ModelArguments,
    MoeficationArguments,
    load_texts,
    load_tokenizer,
    parse,
)
from pipeline import classify
from run import Run, accuracy_of_classes, begin_stages
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments


def main() -> None:
    model_args, data_args, moe_args, training_args = parse(
        (ModelArguments, DataArguments, MoeficationArguments, TrainingArguments), __doc__
    )
    run = begin(model_args, data_args, moe_args, training_args)
    classify(run, partial(make_model, run, model_args), model_args.activation)


def begin(
    model_args: ModelArguments,
    data_args: DataArguments,
    moe_args: MoeficationArguments,
    training_args: TrainingArguments,
) -> Run:
    """Load texts, and find what is wrong with the settings before anything is written."""
    stages = begin_stages(moe_args, training_args, model_args, data_args)
    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="tokenisation"):
        splits, names = load_texts(data_args, tokenizer)
    if training_args.should_save:
        stages.begin()

    def batches(rows, shuffle, seed):
        return Batches(rows, tokenizer, shuffle=shuffle, seed=seed)

    auto = AutoModelForSequenceClassification
    return Run(
        moe_args,
        training_args,
        stages,
        splits,
        names,
        tokenizer,
        auto,
        batches,
        task_type="SEQ_CLS",
        metrics=accuracy_of_classes,
    )


def make_model(run: Run, model_args: ModelArguments) -> PreTrainedModel:
    """The dense model to fine-tune."""
    return AutoModelForSequenceClassification.from_pretrained(
        real_inputs.resolve(model_args.model_name_or_path),
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=model_args.trust_remote_code,
        **run.labels(),
    )


if __name__ == "__main__":
    main()
