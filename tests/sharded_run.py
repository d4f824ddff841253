"""Training a MoEfied checkpoint that is loaded, wrapped in each way, and resuming it, in one of two processes."""

import contextlib
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

STEPS, ROWS, LENGTH, VOCAB = 4, 8, 16, 99
WAYS = ("ddp", "fsdp1", "fsdp1_flat", "fsdp2")
DTYPES = ("float32", "bfloat16")
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def tokens() -> torch.Tensor:
    """(steps, rows, tokens)"""
    return torch.randint(3, VOCAB, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def loaded(folder: Path, dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Weight decay moves every parameter that has a gradient, if only a zero."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def wrapped(model: Any, way: str) -> torch.nn.Module:
    """As accelerate wraps what a model says is not to be split."""
    names = set(model._no_split_modules)
    classes = {type(module) for module in model.modules() if type(module).__name__ in names}
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp2":
        for module in reversed(list(model.modules())):  # what is inside first
            if type(module) in classes:
                fully_shard(module)
        return fully_shard(model)
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=way == "fsdp1", device_id=torch.device("cpu")
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> list[float]:
    """One step per batch (rows, tokens) of this process; the mean loss of all processes at each."""
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shared = loss.detach().float()
        if dist.is_initialized():
            dist.all_reduce(shared)
            shared /= dist.get_world_size()
        losses.append(float(shared))
    return losses


def whole_state(model: torch.nn.Module, way: str) -> dict[str, torch.Tensor]:
    """The parameters, put together again, by the names that the checkpoint has."""
    if way == "fsdp2":
        return dcp.get_model_state_dict(model, options=WHOLE)
    gathered = FullyShardedDataParallel.summon_full_params(model) if way != "ddp" else contextlib.nullcontext()
    with gathered:
        named = {name.replace("_fsdp_wrapped_module.", ""): each for name, each in model.named_parameters()}
        return {name.removeprefix("module."): each.detach().clone() for name, each in named.items()}


def run(folder: Path, way: str, dtype: str) -> dict[str, Any]:
    """Without an interruption, and with one after half of the steps: weights in a checkpoint, moments as they lie."""
    mine = tokens()[:, dist.get_rank() :: dist.get_world_size()]
    model = wrapped(loaded(folder / "moefied", dtype), way)
    losses = train(model, optimizer_of(model), mine)
    state = whole_state(model, way)

    model = wrapped(loaded(folder / "moefied", dtype), way)
    optimizer = optimizer_of(model)
    half = train(model, optimizer, mine[: STEPS // 2])
    weights = whole_state(model, way)
    if dist.get_rank() == 0:
        whole = loaded(folder / "moefied", dtype)
        whole.load_state_dict(weights, strict=False)
        whole.save_pretrained(folder / f"half_{way}_{dtype}")
    dist.barrier()
    again = wrapped(loaded(folder / f"half_{way}_{dtype}", dtype), way)
    resumed_optimizer = optimizer_of(again)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed = half + train(again, resumed_optimizer, mine[STEPS // 2 :])
    return {"losses": losses, "state": state, "resumed": resumed, "resumed_state": whole_state(again, way)}


def run_trainer(folder: Path, output_dir: Path, batch_size: int, resume: bool) -> dict[str, Any]:
    """The same by the Trainer (DDP, where there are processes); `resume` goes on from its checkpoint of step 2."""
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens().flatten(0, 1)]
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=True,
        ddp_backend="gloo" if dist.is_initialized() else None,
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "moefied", trust_remote_code=True)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{STEPS // 2}") if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "state": {name: each.detach() for name, each in model.named_parameters()}}


def results(folder: Path) -> dict[Any, Any]:
    """What the processes come to: by the Trainer, resumed and not, and in each way with each type."""
    found: dict[Any, Any] = {
        resume: run_trainer(folder, folder / "trained", ROWS // 2, resume) for resume in (False, True)
    }
    return found | {(way, dtype): run(folder, way, dtype) for way, dtype in product(WAYS, DTYPES)}
