"""A run of a recipe on labelled text: its arguments, its data, and where its results go."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from common import (
    Batches,
    DataArguments,
    ModelArguments,
    MoeficationArguments,
    Stages,
    load_texts,
    load_tokenizer,
)
from datasets import DatasetDict, concatenate_datasets
from recovery import check_recovery
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from moefy_hf import MoeficationConfig
from moefy_hf.controls import check_control

# arguments that change no result
REPORTING = (
    *("redo", "output_dir", "run_name", "project", "logging_", "log_", "report_to", "disable_tqdm", "push_to_hub"),
    *("hub_", "local_rank", "dataloader_num_workers", "dataloader_p", "save_total_limit", "skip_memory_metrics"),
)


@dataclass
class Run:
    """What the stages share."""

    model_args: ModelArguments
    data_args: DataArguments
    moe_args: MoeficationArguments
    training_args: TrainingArguments
    stages: Stages
    tokenizer: PreTrainedTokenizerBase
    splits: DatasetDict
    names: list[str]

    def autocast(self) -> torch.autocast:
        """As training is."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.training_args.mixed_precision)
        return torch.autocast(self.training_args.device.type, dtype, enabled=dtype is not None)

    def load(self, folder: Path, **kwargs) -> PreTrainedModel:
        """A classifier of this run, on the device that trains."""
        return AutoModelForSequenceClassification.from_pretrained(folder, **kwargs).to(self.training_args.device)

    @property
    def config(self) -> MoeficationConfig:
        return moefication_config(self.moe_args, self.training_args.seed)

    def held_out(self) -> Batches:
        rows = concatenate_datasets([self.splits["validation"], self.splits["test"]])
        return Batches(rows, self.tokenizer, shuffle=True)


def begin(
    model_args: ModelArguments,
    data_args: DataArguments,
    moe_args: MoeficationArguments,
    training_args: TrainingArguments,
) -> Run:
    """Load data, and find what is wrong with the settings before anything is written."""
    training_args.remove_unused_columns = False
    moefication_config(moe_args, training_args.seed)
    check_sweep(moe_args)
    check_recovery(moe_args)
    settings = run_settings(model_args, data_args, moe_args, training_args)
    stages = Stages(training_args.output_dir, settings, moe_args.redo)
    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="tokenisation"):
        splits, names = load_texts(data_args, tokenizer)
    if training_args.should_save:
        stages.begin()
    return Run(model_args, data_args, moe_args, training_args, stages, tokenizer, splits, names)


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
        if isinstance(each, TrainingArguments):
            settings |= json.loads(each.to_json_string()) | {"mixed_precision": each.mixed_precision}
        else:
            settings |= asdict(each)
    return {name: value for name, value in settings.items() if not name.startswith(REPORTING)}
