"""Write a MoEfied model as a checkpoint of an architecture that serving engines know, or as its plain dense one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from ..io import written_whole
from ..loading import check_moefied
from .formats import TARGETS, Target, moe_config, moe_tensors, own_tensors

LINEAR_ROUTERS = ("linear", "prior_approximate", "sigmoid", "mean_gate")


def export(
    model: PreTrainedModel,
    output_dir: str | Path,
    to: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write what `model` computes at the budget it has, for engines that never heard of MoEfication.

    Args:
        output_dir: must not exist, or be empty.
        to: "llama4" (of Llama and Mistral), exact; "mixtral" (of the same), "qwen2_moe", "qwen3_moe", whose softmax
            over experts comes close only; or "dense" (any model: all its neurons, no routers). By default the first
            of these that has the model's attention.
        tokenizer: saved beside the weights.
        max_shard_bytes: size of a weights file; beyond the model itself so much memory is needed.

    Raises:
        ValueError: the model is not MoEfied, or the target cannot express it; says why, and which conversion could be.
        FileExistsError: there is something in output_dir.
    """
    output_dir = Path(output_dir)
    check_moefied(model)
    target = None if to == "dense" else choose_target(model, to)
    if target is not None:
        check_expressible(model, target)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not empty: choose another output_dir")
    with written_whole(output_dir) as folder:
        config = dense_config(model) if target is None else moe_config(model, target)
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_shards(own_tensors(model) if target is None else moe_tensors(model, target), folder, max_shard_bytes)
    return output_dir


def choose_target(model: PreTrainedModel, to: str | None) -> Target:
    """The target that was asked for, or the one with the model's attention."""
    model_type = model.config.model_type
    fitting = [name for name, target in TARGETS.items() if model_type in target.sources]
    if to is not None and to not in TARGETS:
        raise ValueError(f"unknown target {to!r}; choose from {', '.join([*TARGETS, 'dense'])}")
    if to is None and not fitting or to is not None and to not in fitting:
        exportable = "; ".join(f"{' and '.join(target.sources)} to {name}" for name, target in TARGETS.items())
        raise ValueError(f"a {model_type} model cannot become {to or 'a served MoE'}: {exportable}; any to 'dense'")
    if not model._get_name().endswith("ForCausalLM"):
        raise ValueError(f"{model._get_name()} is no causal language model, which is what the served MoEs are")
    return TARGETS[to or next(name for name in fitting if name != "llama4" or not slides(model))]


def slides(model: PreTrainedModel) -> bool:
    """Whether attention is limited to a window of the last tokens."""
    return getattr(model.config, "sliding_window", None) is not None


def check_expressible(model: PreTrainedModel, target: Target) -> None:
    """What the target's formula has no place for, and the settings that avoid it."""
    sites, router = model.moe_sites(), model.config.moefication["router"]
    if router not in LINEAR_ROUTERS:
        raise ValueError(
            f"served MoEs have a linear router, this model a {router!r} one: convert with router='linear'"
        )
    section = model.config.moefication
    if section["selection"]["type"] != "top_k":
        raise ValueError(
            f"served MoEs compute the same number of experts for every token, this model selects by "
            f"{section['selection']['type']!r}: model.set_selection(type='top_k', k=...) first"
        )
    if section.get("shared_experts", 0) > (1 if target.config is Llama4TextConfig else 0):
        raise ValueError(
            f"{target.architecture} has no place for {section['shared_experts']} shared experts: only Llama 4 has one"
        )
    if section.get("compensation"):
        raise ValueError("served MoEs have no mean compensation: convert with compensation=False")
    budgets = {site.act.k for site in sites}
    if len(budgets) > 1:
        raise ValueError(
            f"layers compute {min(budgets)} to {max(budgets)} experts; served MoEs have one k for all: "
            "model.set_selection(k=..., allocation='uniform') first"
        )
    if len({(site.act.num_experts, site.sizes[1]) for site in sites}) > 1:
        raise ValueError("experts differ between layers in number or size; served MoEs have one size for all")
    if len(sites) < model.config.num_hidden_layers and not target.dense_layers:
        raise ValueError(
            f"{len(sites)} of {model.config.num_hidden_layers} layers are MoEfied, and {target.architecture} has no "
            "dense ones: convert with layers=None"
        )
    biased = [name for site in sites for name in ("gate", "up", "down") if getattr(site, name).bias is not None]
    attention = getattr(model.config, "attention_bias", False) and not hasattr(target.config(), "attention_bias")
    if biased or attention:
        where = "the attention" if attention else f"the FFNs ({', '.join(dict.fromkeys(biased))})"
        raise ValueError(f"{target.architecture} has no biases, this model has some in {where}")
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()) and target.config is Qwen3MoeConfig:
        raise ValueError("Qwen3MoeForCausalLM has no sliding attention in some of its layers only")
    if slides(model) and target.config is Llama4TextConfig:
        raise ValueError("Llama4ForCausalLM has no sliding attention: export to 'mixtral', which has")
    if model.dtype == torch.float16:
        raise ValueError("float16 cannot hold the scaled router: export in float32 or bfloat16, e.g. model.float()")


def dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    settings = {
        name: value for name, value in model.config.to_dict().items() if name not in ("moefication", "auto_map")
    }
    return type(model.config)(**settings | {"architectures": [model._get_name()]})


def write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, max_bytes: int) -> None:
    """Safetensors files as save_pretrained names them, with an index where there is more than one."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if held and size + nbytes > max_bytes:
            flush()
            size = 0
        held[name] = tensor.cpu().contiguous().clone()
        size, total = size + nbytes, total + nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {}}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        index["weight_map"] |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
