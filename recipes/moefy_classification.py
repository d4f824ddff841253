"""Fine-tune an encoder on labelled text, MoEfy it, and measure quality against compute.

    accelerate launch recipes/moefy_classification.py --config recipes/configs/minilm_movie/moefication.yaml

Stages, each skipped when its result is there: dense/ (the fine-tuned dense model), moefied/ (the converted model),
sweep.json and sweep.png (quality at several budgets). Any setting of the YAML file can be given on the command line:

    ... --model_name_or_path google-bert/bert-base-uncased --dataset_name stanfordnlp/sst2 --text_column sentence \\
        --test_split validation --share 0.3
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import real_inputs
import torch
from common import (
    Batches,
    DataArguments,
    ModelArguments,
    MoeficationArguments,
    Stages,
    load_texts,
    load_tokenizer,
    parse,
    write_json,
)
from datasets import DatasetDict, concatenate_datasets
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from moefy_hf import MoeficationConfig, SparsityPenaltyCallback, Sweep, evaluate, moefy_, relufy_
from moefy_hf.controls import check_control
from moefy_hf.conversion import check_convertible

# arguments that change no result
REPORTING = (
    *("redo", "output_dir", "run_name", "project", "logging_", "log_", "report_to", "disable_tqdm", "push_to_hub"),
    *("hub_", "local_rank", "dataloader_num_workers", "dataloader_p", "save_total_limit", "skip_memory_metrics"),
)


def main() -> None:
    model_args, data_args, moe_args, training_args = parse(
        (ModelArguments, DataArguments, MoeficationArguments, TrainingArguments), __doc__
    )
    training_args.remove_unused_columns = False
    config = moefication_config(moe_args, training_args.seed)  # bad settings end the run here
    check_sweep(moe_args)
    settings = run_settings(model_args, data_args, moe_args, training_args)
    stages = Stages(training_args.output_dir, settings, moe_args.redo)
    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="tokenisation"):
        splits, names = load_texts(data_args, tokenizer)
    if training_args.should_save:
        stages.begin()

    dense = train_dense(stages, model_args, moe_args, training_args, tokenizer, splits, names)
    if not training_args.should_save:
        return  # conversion and evaluation are one process' work
    moefied = stages.run("moefied", lambda path: convert(dense, config, tokenizer, splits, path))
    stages.run("sweep.json", lambda path: sweep(moefied, moe_args, training_args, tokenizer, splits, path))
    show(stages.directory)


def moefication_config(moe_args: MoeficationArguments, seed: int) -> MoeficationConfig:
    selection = {"type": "top_k", "k": moe_args.share, "allocation": moe_args.allocation}
    return MoeficationConfig(
        num_experts=moe_args.num_experts,
        expert_size=moe_args.expert_size,
        splitter=moe_args.splitter,
        router=moe_args.router,
        selection=selection,
        calibration_tokens=moe_args.calibration_tokens,
        seed=seed,
    )


def check_sweep(moe_args: MoeficationArguments) -> None:
    for control in moe_args.controls:
        check_control(control)
    for share in moe_args.shares:
        moefication_config(replace(moe_args, share=share), seed=0)


def run_settings(*arguments) -> dict:
    """What decides the results of a run, to notice when another run asks for something else in the same place."""
    settings: dict = {}
    for each in arguments:
        settings |= json.loads(each.to_json_string()) if isinstance(each, TrainingArguments) else asdict(each)
    return {name: value for name, value in settings.items() if not name.startswith(REPORTING)}


def train_dense(
    stages: Stages,
    model_args: ModelArguments,
    moe_args: MoeficationArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    splits: DatasetDict,
    names: list[str],
) -> Path:
    """Fine-tune the dense model, with another activation and a sparsity penalty where asked for."""
    if stages.finished("dense"):
        return stages.directory / "dense"
    set_seed(training_args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        real_inputs.resolve(model_args.model_name_or_path),
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=model_args.trust_remote_code,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: position for position, name in enumerate(names)},
    )
    check_convertible(model, moefication_config(moe_args, training_args.seed), splits["train"])  # before training it
    if model_args.activation:
        relufy_(model, model_args.activation)
    penalty = moe_args.sparsity_penalty
    trainer = Trainer(
        model,
        training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
        callbacks=[SparsityPenaltyCallback(penalty, moe_args.sparsity_weight)] if penalty else None,
    )
    trainer.train()
    if training_args.should_save:
        stages.run("dense", lambda path: save(trainer.model, tokenizer, path))
    training_args.distributed_state.wait_for_everyone()
    return stages.directory / "dense"


def convert(
    dense: Path, config: MoeficationConfig, tokenizer: PreTrainedTokenizerBase, splits: DatasetDict, path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    report = moefy_(model, config, Batches(splits["train"], tokenizer, shuffle=True, seed=config.seed))
    save(model, tokenizer, path)
    write_json(path / "conversion.json", report.to_dict())
    print(report.table(), flush=True)


def sweep(
    moefied: Path,
    moe_args: MoeficationArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    splits: DatasetDict,
    path: Path,
) -> None:
    """Validation and test together, under autocast where training was."""
    model = AutoModelForSequenceClassification.from_pretrained(moefied, trust_remote_code=True)
    rows = Batches(concatenate_datasets([splits["validation"], splits["test"]]), tokenizer, shuffle=True)
    allocations = (
        ["uniform", "sensitivity"] if moe_args.allocation == "sensitivity" else ["uniform"]
    )  # what is measured
    with torch.autocast(model.device.type, torch.bfloat16, enabled=training_args.bf16):
        found = evaluate(model, rows, moe_args.shares, controls=moe_args.controls, allocations=allocations)
    found.save(path)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def show(directory: Path) -> None:
    found = Sweep.load(directory / "sweep.json")
    found.plot(directory / "sweep.png")
    print(found.table())
    for what, name in (("dense model", "dense"), ("MoEfied model", "moefied"), ("plot", "sweep.png")):
        print(f"{what}: {directory / name}")


if __name__ == "__main__":
    main()
