# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots]"]
# ///
"""Train or fine-tune an encoder-decoder on pairs of texts, MoEfy it, and measure quality and time against compute.

    accelerate launch recipes/moefy_seq2seq.py --config recipes/configs/t5_r8/moefication.yaml

The stages are those of moefy_classification.py. Quality in sweep.json is the accuracy of the target's tokens;
scores_*.json hold --metrics of generated targets, by default how many are exactly right. Without --model_name_or_path
a small T5 is trained from nothing:

    ... --model_name_or_path google-t5/t5-small --dataset_name knkarthick/samsum --source_column dialogue \\
        --target_column summary --source_prefix "summarize: " --metrics rouge
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
)

from moefy_hf.recipes import arguments as of
from moefy_hf.recipes.data import CollatedBatches, load_pairs, override
from moefy_hf.recipes.inputs import resolve
from moefy_hf.recipes.plans import training_plan
from moefy_hf.recipes.publishing import publish
from moefy_hf.recipes.run import Run
from moefy_hf.recipes.scores import Metrics, evaluate_models
from moefy_hf.recipes.settings import Arguments, check, checking, parse
from moefy_hf.recipes.stages import Stages
from moefy_hf.recipes.steps import compare_budgets, convert, show_sweep
from moefy_hf.recipes.summary import summarise
from moefy_hf.recipes.timing import measure_times
from moefy_hf.recipes.training import fine_tune, recover, train_scheduled

TYPES = (
    *(of.Seq2SeqModelArguments, of.PairDataArguments, of.EvaluationArguments, of.ControlArguments),
    *(of.MetricArguments, of.GenerationArguments, of.TimingArguments, of.SparsityArguments, of.RecoveryArguments),
    *(of.DistillationArguments, of.LearnedArguments, of.ScheduleArguments, of.OutputArguments),
    Seq2SeqTrainingArguments,
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


def begin(arguments: Arguments) -> Run:
    """Load pairs, and find what is wrong with the settings before anything is written.

    Raises:
        ValueError: bad settings or data, or results of other settings in the output directory.
    """
    metrics, training = arguments[of.MetricArguments], arguments[Seq2SeqTrainingArguments]
    metrics.choose("exact_match")
    check(arguments)
    plan, redo = training_plan(arguments), arguments[of.OutputArguments].redo
    stages = Stages(training.output_dir, plan, arguments, redo)
    tokenizer = load_tokenizer(arguments[of.Seq2SeqModelArguments])
    with training.main_process_first(desc="tokenisation"):
        splits = load_pairs(arguments.data, tokenizer)
    make_config(arguments.model, tokenizer)
    judge = Metrics(metrics.metrics, sample=["a text"])
    if training.should_save:
        stages.begin()
    collator = DataCollatorForSeq2Seq(tokenizer)

    def batches(rows, shuffle, seed):
        return CollatedBatches(rows, collator, shuffle=shuffle, seed=seed)

    return Run(
        arguments,
        stages,
        splits,
        [],
        tokenizer,
        AutoModelForSeq2SeqLM,
        batches,
        judge,
        predict=generate,
        collator=collator,
        task_type="SEQ_2_SEQ_LM",
        trainer=Seq2SeqTrainer,
        compute_metrics=partial(of_texts, tokenizer, judge) if training.predict_with_generate else None,
    )


def load_tokenizer(model: of.Seq2SeqModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer that is named, or the model's."""
    name = model.tokenizer_name or model.model_name_or_path
    if name is None:
        raise ValueError("a new T5 needs --tokenizer_name")
    return AutoTokenizer.from_pretrained(resolve(name))


def make_model(run: Run) -> PreTrainedModel:
    """Load or make the dense model to train."""
    model = run.arguments.model
    if model.model_name_or_path is not None:
        return AutoModelForSeq2SeqLM.from_pretrained(resolve(model.model_name_or_path), revision=model.model_revision)
    return AutoModelForSeq2SeqLM.from_config(make_config(model, run.processor))


def make_config(model: of.Seq2SeqModelArguments, tokenizer: PreTrainedTokenizerBase) -> T5Config:
    """Return the sizes of a new T5."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    config = T5Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    config.num_decoder_layers = None
    override(config, model.config_overrides)
    config.num_decoder_layers = config.num_decoder_layers or config.num_layers
    return config


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    """Return the texts of token ids, of which negative ones are padding."""
    ids = np.where(np.asarray(ids) < 0, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def of_texts(tokenizer: PreTrainedTokenizerBase, judge: Metrics, found: EvalPrediction) -> dict[str, float]:
    """Return what the Trainer shows of generated targets."""
    return judge(decoded(tokenizer, found.predictions), decoded(tokenizer, found.label_ids))


@torch.no_grad()
def generate(run: Run, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return the targets that a model generates, greedily, and the right ones."""
    found: list[str] = []
    right: list[str] = []
    for batch in run.held_out(run.arguments[of.GenerationArguments].generated_rows):
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        with run.autocast():
            ids = model.generate(**inputs, max_new_tokens=run.arguments.data.max_target_length, do_sample=False)
        found += decoded(run.processor, ids.cpu())
        right += decoded(run.processor, batch["labels"])
    return found, right


if __name__ == "__main__":
    main()
