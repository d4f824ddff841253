"""Run by torchrun: the Trainer trains a MoEfied checkpoint by DeepSpeed on CPUs, for a few steps."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch  # noqa: E402
from sharded_run import ROWS, STEPS, tokens  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402


def main() -> None:
    folder, output, stage = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    args = TrainingArguments(
        output_dir=output,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // processes,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        deepspeed={
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
    )
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # shared out as it is loaded
    trainer = Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens().flatten(0, 1)])
    trainer.train()
    trainer.save_model(output)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save(losses, Path(output, "losses.pt"))


if __name__ == "__main__":
    main()
