"""The served MoE architectures: what their configs and checkpoints hold of a MoEfied model.

Two ways to give every selected expert the weight that it has in a MoEfied FFN, 1, by scaling router scores by a power
of two, which leaves their order as it is:

- Llama 4 selects by the scores themselves, and multiplies an expert's input by sigmoid(score). Scores below 1e-10
  make that exactly 1 / 2, in every dtype; twice the gate and up weights undo it. Exact.
- Mixtral and the Qwen MoEs select by, and weigh with, a softmax. Tiny scores make the weights nearly equal, 1 / k
  each; `down` times k makes them nearly 1. Float32 bounds this on both sides: weights differ from 1 by as much as the
  scaled scores differ, and experts whose scaled scores differ by less than 6e-8 are equals to the softmax. Not exact.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from ..modeling.ffn_sites import FfnSite

# standard deviation of the scaled scores
SPREAD = 2.0**-14  # for a softmax: ties are then those closer than 1 / 1,000 of it
VANISHING = 2.0**-50  # for a sigmoid


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
    "llama4": Target(Llama4TextConfig, "Llama4ForCausalLM", ("llama", "mistral"), "feed_forward", GATE_UP_DOWN, True),
    "mixtral": Target(
        MixtralConfig, "MixtralForCausalLM", ("llama", "mistral"), "block_sparse_moe", ("w1", "w3", "w2"), False
    ),
    "qwen2_moe": Target(Qwen2MoeConfig, "Qwen2MoeForCausalLM", ("qwen2",), "mlp", GATE_UP_DOWN, True),
    "qwen3_moe": Target(Qwen3MoeConfig, "Qwen3MoeForCausalLM", ("qwen3",), "mlp", GATE_UP_DOWN, True),
}


def moe_config(model: PreTrainedModel, target: Target) -> PreTrainedConfig:
    """The settings that both configs have, and the experts."""
    site, source = model.moe_sites()[0], model.config.to_dict()
    known = set(target.config().to_dict()) - {"model_type", "architectures", "transformers_version"}
    settings = {name: value for name, value in source.items() if name in known | {"head_dim", "dtype"}}
    experts, size = site.act.router.num_experts, site.act.expert_size
    settings |= {"num_experts_per_tok": site.act.selection.k, "architectures": [target.architecture]}
    if target.config is Llama4TextConfig:
        return llama4_config(model, settings, experts, size)
    if target.config is MixtralConfig:
        return MixtralConfig(**settings | {"num_local_experts": experts, "intermediate_size": size})
    dense = set(range(model.config.num_hidden_layers)) - {layer_of(site) for site in model.moe_sites()}
    settings |= {
        "num_experts": experts,
        "moe_intermediate_size": size,
        "norm_topk_prob": True,
        "mlp_only_layers": sorted(dense),
    }
    if target.config is Qwen2MoeConfig:
        settings["shared_expert_intermediate_size"] = size  # which must exist, and adds nothing
    return target.config(**settings)


def llama4_config(model: PreTrainedModel, settings: dict, experts: int, size: int) -> Llama4TextConfig:
    """Llama's attention in Llama 4's terms: positions and full attention in every layer, nothing normalised."""
    settings |= {
        "num_local_experts": experts,
        "intermediate_size": size,
        "intermediate_size_mlp": model.config.intermediate_size,
        "moe_layers": [layer_of(site) for site in model.moe_sites()],
        "no_rope_layers": [1] * model.config.num_hidden_layers,
        "layer_types": ["full_attention"] * model.config.num_hidden_layers,
        "attention_chunk_size": None,
        "attn_temperature_tuning": False,
        "use_qk_norm": False,
        "head_dim": head_dim(model.config),
    }
    return Llama4TextConfig(**settings)


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_of(site: FfnSite) -> int:
    """The number in "model.layers.3.mlp"."""
    return next(int(part) for part in site.name.split(".") if part.isdigit())


def own_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors that are saved, tied ones once, without routers."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        added = ".router." in name or name.endswith(".neuron_order")
        if not added and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def moe_tensors(model: PreTrainedModel, target: Target) -> Iterator[tuple[str, torch.Tensor]]:
    """Keys and tensors of the target's checkpoint, one FFN at a time."""
    if target.config is Llama4TextConfig:
        yield from llama4_tensors(model)
        return
    sites = {f"{site.name}.": site for site in model.moe_sites()}
    for name, tensor in own_tensors(model):
        if not name.startswith(tuple(sites)):
            yield name, tensor
    for site in sites.values():
        prefix = f"{site.name.rpartition('.')[0]}.{target.block}"
        routed, (d, f) = site.act, site.sizes
        size = f // routed.num_experts
        norm = model.get_submodule(f"{site.name.rpartition('.')[0]}.post_attention_layernorm")
        router = scaled(routed.router.weight.detach(), norm.weight.detach(), SPREAD)
        yield f"{prefix}.gate.weight", router.to(model.dtype)
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


def llama4_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    sites = {f"{site.name}.": site for site in model.moe_sites()}
    for name, tensor in own_tensors(model):
        if name.startswith(tuple(sites)):
            continue
        if ".q_proj." in name or ".k_proj." in name:
            tensor = interleaved(tensor, head_dim(model.config))
        yield name.replace(".mlp.", ".feed_forward."), tensor
    for site in sites.values():
        prefix = f"{site.name.rpartition('.')[0]}.feed_forward"
        routed, (d, _) = site.act, site.sizes
        size, shared = routed.expert_size, routed.shared
        router, ones = routed.router.weight.detach(), torch.ones(d)
        yield f"{prefix}.router.weight", scaled(router, ones.to(router), VANISHING).to(model.dtype)
        gate, up, down = (part.weight.detach() for part in (site.gate, site.up, site.down))
        both = torch.cat([gate.unflatten(0, (-1, size)), up.unflatten(0, (-1, size))], 1)  # (E, 2m, d)
        yield f"{prefix}.experts.gate_up_proj", 2 * both[shared:].transpose(1, 2)
        yield f"{prefix}.experts.down_proj", down.t().unflatten(0, (-1, size))[shared:]
        first = gate[:size], up[:size], down[:, :size]
        for part, tensor in zip(GATE_UP_DOWN, first, strict=True):  # which must exist; without one, adds nothing
            yield f"{prefix}.shared_expert.{part}.weight", tensor if shared else torch.zeros_like(tensor)


def interleaved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(heads * head_dim, ...): Llama turns pairs (i, i + head_dim / 2) of a head, Llama 4 pairs (2i, 2i + 1)."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def scaled(router: torch.Tensor, norm: torch.Tensor, spread: float) -> torch.Tensor:
    """router (E, d), norm (d,) the scale of its input's normalisation -> (E, d): times the power of two that gives the
    scores of one token a standard deviation of at most `spread`, were the normalised input white."""
    own = float(((router - router.mean(0)).float() * norm.float()).square().sum(-1).mean().sqrt())
    return router * 2.0 ** math.floor(math.log2(spread / max(own, 1e-12)))
