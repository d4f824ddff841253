"""Train or fine-tune an encoder-decoder on pairs of texts, MoEfy it, and measure quality against compute.

    accelerate launch recipes/moefy_seq2seq.py --config recipes/configs/t5_r8/moefication.yaml

The stages are those of moefy_classification.py, with the accuracy of the target's tokens as quality; generated_*.json
hold how many targets the models generate exactly. Without --model_name_or_path a small T5 is trained from nothing:

    ... --model_name_or_path google-t5/t5-small --dataset_name knkarthick/samsum --source_column dialogue \\
        --target_column summary --source_prefix "summarize: "
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import real_inputs
import torch
from common import CollatedBatches, MoeficationArguments, load_splits, override, parse
from datasets import DatasetDict
from pipeline import budgets, classify
from run import Run, begin_stages, models_of
from stages import write_json
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


@dataclass
class Seq2SeqModelArguments:
    """The dense model to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local directory; nothing trains a new T5"}
    )
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit on the Hub"})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id, local directory or package:NAME; by default the model's"}
    )
    config_overrides: str = field(
        default="", metadata={"help": "sizes of a new T5: d_model=128,d_ff=512,num_layers=3"}
    )
    activation: str | None = field(
        default=None, metadata={"help": "swap the FFN activation for this one before training, e.g. relu"}
    )


@dataclass
class Seq2SeqDataArguments:
    """Pairs of texts."""

    dataset_name: str = field(metadata={"help": "Hub id, local directory of csv/parquet files, or package:NAME"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    source_column: str = field(default="text", metadata={"help": "column with the input"})
    target_column: str = field(default="label", metadata={"help": "column with the output, text"})
    source_prefix: str = field(default="", metadata={"help": "put before every input"})
    max_source_length: int = field(default=64, metadata={"help": "longer inputs are cut to so many tokens"})
    max_target_length: int = field(default=16, metadata={"help": "longer outputs are cut to so many tokens"})
    validation_split: str = field(default="validation", metadata={"help": "name of the validation split"})
    test_split: str = field(default="test", metadata={"help": "name of the test split"})
    generated_rows: int = field(default=200, metadata={"help": "rows of validation and test to generate for"})


def main() -> None:
    types = (Seq2SeqModelArguments, Seq2SeqDataArguments, MoeficationArguments, Seq2SeqTrainingArguments)
    model_args, data_args, moe_args, training_args = parse(types, __doc__)
    stages = begin_stages(moe_args, training_args, model_args, data_args)
    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="tokenisation"):
        splits = load_pairs(data_args, tokenizer)
    make = partial(make_model, model_args, tokenizer)
    if training_args.should_save:
        stages.begin()
    collator = DataCollatorForSeq2Seq(tokenizer)

    def batches(rows, shuffle, seed):
        return CollatedBatches(rows, collator, shuffle=shuffle, seed=seed)

    run = Run(
        moe_args,
        training_args,
        stages,
        splits,
        [],
        tokenizer,
        AutoModelForSeq2SeqLM,
        batches,
        collator,
        task_type="SEQ_2_SEQ_LM",
        trainer=Seq2SeqTrainer,
        metrics=partial(exact_match, tokenizer) if training_args.predict_with_generate else None,
    )
    classify(run, make, model_args.activation)
    if training_args.should_save:
        for name in models_of(moe_args):
            found = stages.run(f"generated_{name}.json", partial(generate, run, data_args, name))
            print(f"exactly generated targets: {found.read_text()}")


def load_tokenizer(model_args: Seq2SeqModelArguments) -> PreTrainedTokenizerBase:
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None:
        raise ValueError("a new T5 needs --tokenizer_name")
    return AutoTokenizer.from_pretrained(real_inputs.resolve(name))


def load_pairs(data: Seq2SeqDataArguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Tokenised train, validation and test splits with `labels`.

    Raises:
        ValueError: a split or column is missing, or targets are no text; what there is is named.
    """
    splits = {"train": "train", "validation": data.validation_split, "test": data.test_split}
    raw = load_splits(data, splits.values(), (data.source_column, data.target_column))
    if not isinstance(raw["train"][0][data.target_column], str):
        raise ValueError(f"column {data.target_column!r} of {data.dataset_name} is no text")

    def encode(rows: dict[str, list]) -> dict[str, list]:
        sources = [data.source_prefix + text for text in rows[data.source_column]]
        encoded = tokenizer(sources, truncation=True, max_length=data.max_source_length)
        targets = tokenizer(text_target=rows[data.target_column], truncation=True, max_length=data.max_target_length)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": targets["input_ids"],
        }

    return DatasetDict(
        {
            ours: raw[theirs].map(
                encode, batched=True, remove_columns=raw[theirs].column_names, desc=f"tokenize {ours}"
            )
            for ours, theirs in splits.items()
        }
    )


def make_model(model_args: Seq2SeqModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The dense model to train."""
    if model_args.model_name_or_path is not None:
        path = real_inputs.resolve(model_args.model_name_or_path)
        return AutoModelForSeq2SeqLM.from_pretrained(path, revision=model_args.model_revision)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    config = T5Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    config.num_decoder_layers = None
    override(config, model_args.config_overrides)
    config.num_decoder_layers = config.num_decoder_layers or config.num_layers
    return AutoModelForSeq2SeqLM.from_config(config)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    ids = np.where(np.asarray(ids) < 0, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def exact_match(tokenizer: PreTrainedTokenizerBase, found: EvalPrediction) -> dict[str, float]:
    pairs = zip(decoded(tokenizer, found.predictions), decoded(tokenizer, found.label_ids), strict=True)
    return {"exact_match": float(np.mean([ours == theirs for ours, theirs in pairs]))}


@torch.no_grad()
def generate(run: Run, data: Seq2SeqDataArguments, name: str, path: Path) -> None:
    """Share of targets that a model generates exactly, at every share of the experts."""
    scores: dict[str, float] = {}
    model = run.load(run.stages.directory / name, trust_remote_code=True).eval()
    for budget in budgets(run, model):
        right = total = 0
        for batch in run.held_out(data.generated_rows):
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            with run.autocast():
                ids = model.generate(**inputs, max_new_tokens=data.max_target_length, do_sample=False)
            pairs = zip(decoded(run.processor, ids.cpu()), decoded(run.processor, batch["labels"]), strict=True)
            right, total = right + sum(ours == theirs for ours, theirs in pairs), total + len(ids)
        scores[f"{name}{budget}"] = right / total
    write_json(path, scores)


if __name__ == "__main__":
    main()
