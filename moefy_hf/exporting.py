"""Write a MoEfied model as a checkpoint of an architecture that serving engines know, or as its plain dense one.

Mixtral and the Qwen MoEs weigh the selected experts by a softmax over their router scores. Scores made tiny by a power
of two, which leaves their order as it is, make those weights equal, 1 / k each; multiplying `down` by k then makes
them 1, which is what a MoEfied FFN computes. Float32 bounds this on both sides: weights differ from 1 by as much as
the scaled scores differ, and experts whose scaled scores differ by less than 6e-8 are equals to the softmax.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from .folders import written_whole
from .modeling.ffn_sites import FfnSite
from .modeling.moefied import is_moefied

SPREAD = 2.0**-14  # standard deviation of the scaled scores; ties are then those closer than 1 / 1,000 of it
LINEAR_ROUTERS = ("linear", "prior_approximate")


@dataclass(frozen=True)
class Target:
    """A served MoE architecture.

    Attributes:
        sources: model types whose attention, norms and embeddings it has.
        block: name of the MoE in a layer's checkpoint keys, and `names` those of (gate, up, down) in an expert.
        dense_layers: whether layers may keep a dense FFN.
    """

    config: type[PreTrainedConfig]
    architecture: str
    sources: tuple[str, ...]
    block: str
    names: tuple[str, str, str]
    dense_layers: bool


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
TARGETS = {
    "mixtral": Target(
        MixtralConfig, "MixtralForCausalLM", ("llama", "mistral"), "block_sparse_moe", ("w1", "w3", "w2"), False
    ),
    "qwen2_moe": Target(Qwen2MoeConfig, "Qwen2MoeForCausalLM", ("qwen2",), "mlp", GATE_UP_DOWN, True),
    "qwen3_moe": Target(Qwen3MoeConfig, "Qwen3MoeForCausalLM", ("qwen3",), "mlp", GATE_UP_DOWN, True),
}


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
        to: "mixtral" (of Llama and Mistral), "qwen2_moe", "qwen3_moe", or "dense" (any model: all its neurons, no
            routers); by default the one that has the model's attention.
        tokenizer: saved beside the weights.
        max_shard_bytes: size of a weights file; beyond the model itself so much memory is needed.

    Raises:
        ValueError: the model is not MoEfied, or the target cannot express it; says why, and which conversion could be.
        FileExistsError: there is something in output_dir.
    """
    output_dir = Path(output_dir)
    if not is_moefied(model):
        raise ValueError(f"{type(model).__name__} is not MoEfied; convert it with moefy_hf.moefy_ first")
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
    return TARGETS[to or fitting[0]]


def check_expressible(model: PreTrainedModel, target: Target) -> None:
    """What the target's formula has no place for, and the settings that avoid it."""
    sites, router = model.moe_sites(), model.config.moefication["router"]
    if router not in LINEAR_ROUTERS:
        raise ValueError(
            f"served MoEs have a linear router, this model a {router!r} one: convert with router='linear'"
        )
    budgets = {site.act.selection.k for site in sites}
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
    if model.dtype == torch.float16:
        raise ValueError("float16 cannot hold the scaled router: export in float32 or bfloat16, e.g. model.float()")


def moe_config(model: PreTrainedModel, target: Target) -> PreTrainedConfig:
    """The settings that both configs have, and the experts."""
    site, source = model.moe_sites()[0], model.config.to_dict()
    known = set(target.config().to_dict()) - {"model_type", "architectures", "transformers_version"}
    settings = {name: value for name, value in source.items() if name in known | {"head_dim", "dtype"}}
    experts, size = site.act.num_experts, site.sizes[1] // site.act.num_experts
    settings |= {"num_experts_per_tok": site.act.selection.k, "architectures": [target.architecture]}
    if target.config is MixtralConfig:
        return MixtralConfig(**settings | {"num_local_experts": experts, "intermediate_size": size})
    converted = {layer_of(site) for site in model.moe_sites()}
    settings |= {
        "num_experts": experts,
        "moe_intermediate_size": size,
        "norm_topk_prob": True,
        "mlp_only_layers": [layer for layer in range(model.config.num_hidden_layers) if layer not in converted],
    }
    if target.config is Qwen2MoeConfig:
        settings["shared_expert_intermediate_size"] = size  # which must exist, and adds nothing
    return target.config(**settings)


def dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    settings = {
        name: value for name, value in model.config.to_dict().items() if name not in ("moefication", "auto_map")
    }
    return type(model.config)(**settings | {"architectures": [model._get_name()]})


def layer_of(site: FfnSite) -> int:
    """The number in "model.layers.3.mlp"."""
    return next(int(part) for part in site.name.split(".") if part.isdigit())


def own_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors that are saved, tied ones once, without routers."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".router." not in name and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def moe_tensors(model: PreTrainedModel, target: Target) -> Iterator[tuple[str, torch.Tensor]]:
    """Keys and tensors of the target's checkpoint, one FFN at a time."""
    sites = {f"{site.name}.": site for site in model.moe_sites()}
    for name, tensor in own_tensors(model):
        if not name.startswith(tuple(sites)):
            yield name, tensor
    for site in sites.values():
        prefix = f"{site.name.rpartition('.')[0]}.{target.block}"
        routed, (d, f) = site.act, site.sizes
        size = f // routed.num_experts
        norm = model.get_submodule(f"{site.name.rpartition('.')[0]}.post_attention_layernorm")
        yield f"{prefix}.gate.weight", scaled(routed.router.weight.detach(), norm.weight.detach()).to(model.dtype)
        gate, up, down = (part.weight.detach() for part in (site.gate, site.up, site.down))
        for expert in range(routed.num_experts):
            own = slice(expert * size, (expert + 1) * size)
            tensors = gate[own], up[own], down[:, own] * routed.selection.k
            for part, tensor in zip(target.names, tensors, strict=True):
                yield f"{prefix}.experts.{expert}.{part}.weight", tensor
        if target.config is Qwen2MoeConfig:
            yield f"{prefix}.shared_expert_gate.weight", gate.new_zeros(1, d)
            for part, shape in zip(target.names, ((size, d), (size, d), (d, size)), strict=True):
                yield f"{prefix}.shared_expert.{part}.weight", gate.new_zeros(shape)


def scaled(router: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """router (E, d), norm (d,) the scale of its input's normalisation -> (E, d): times the power of two that gives the
    scores of one token a standard deviation of at most SPREAD, were the normalised input white."""
    spread = float(((router - router.mean(0)).float() * norm.float()).square().sum(-1).mean().sqrt())
    return router * 2.0 ** math.floor(math.log2(SPREAD / max(spread, 1e-12)))


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
