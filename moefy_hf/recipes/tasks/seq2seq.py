"""Train or fine-tune an encoder-decoder on pairs of texts, MoEfy it, and measure quality and time against compute.

    moefy train seq2seq --config recipes/configs/t5_r8/moefication.yaml

The stages are those of moefy train classification. Quality in sweep.json is the accuracy of the target's tokens;
scores_*.json hold --metrics of generated targets, by default how many are exactly right. Without --model_name_or_path
a small T5 is trained from nothing:

    ... --model_name_or_path google-t5/t5-small --dataset_name knkarthick/samsum --source_column dialogue \\
        --target_column summary --source_prefix "summarize: " --metrics rouge
"""

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
)

from .. import arguments as of
from ..data import load_pairs, override
from ..inputs import resolve
from ..run import Run
from ..scores import Metrics
from ..settings import Arguments
from ..stages import Stages
from .base import Task


def load(arguments: Arguments, stages: Stages) -> Run:
    """Load pairs of texts.

    Raises:
        ValueError: bad settings or data.
    """
    tokenizer = load_tokenizer(arguments[of.Seq2SeqModelArguments])
    splits = load_pairs(arguments.data, tokenizer)
    make_config(arguments.model, tokenizer)
    judge = Metrics(arguments[of.MetricArguments].metrics, sample=["a text"])
    collator = DataCollatorForSeq2Seq(tokenizer)

    shown = arguments[Seq2SeqTrainingArguments].predict_with_generate
    return Run(
        arguments,
        stages,
        splits,
        [],
        tokenizer,
        AutoModelForSeq2SeqLM,
        judge,
        predict=generate,
        collator=collator,
        task_type="SEQ_2_SEQ_LM",
        trainer=Seq2SeqTrainer,
        compute_metrics=partial(of_texts, tokenizer, judge) if shown else None,
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
    )
    config.decoder_start_token_id = tokenizer.pad_token_id  # type: ignore[attr-defined]
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
            ids = cast(GenerationMixin, model).generate(
                **inputs, max_new_tokens=run.arguments.data.max_target_length, do_sample=False
            )
        found += decoded(run.processor, ids.cpu())
        right += decoded(run.processor, batch["labels"])
    return found, right


TASK = Task(
    __doc__,
    (
        *(of.Seq2SeqModelArguments, of.PairDataArguments, of.MetricArguments, of.GenerationArguments),
        of.ScheduleArguments,
    ),
    load,
    make_model,
    metric="exact_match",
    training=Seq2SeqTrainingArguments,
)
