"""The served MoE architectures: what their configs and checkpoints hold of a MoEfied model.

All weigh their selected experts by a softmax, where a MoEfied FFN weighs each by 1. Scores that a power of two makes
tiny keep their order, and get nearly the same weight from it, 1 / k each. `down` times k makes that 1.

- GraniteMoE selects by the scores themselves, and takes the softmax of those selected. Scores below 1e-10 make its
  weights 1 / k to the last bit. Exact.
- Mixtral and the Qwen MoEs, as transformers and llama.cpp run them, select by a softmax of all scores. Float32 bounds
  this on both sides: weights differ from 1 by as much as the scaled scores differ, and experts whose scaled scores
  differ by less than 6e-8 are equals to the softmax. Not exact.

In bfloat16 weights are rounded, and scores around 2**-12 do in both. They also suit engines that run GraniteMoE with a
softmax of all scores.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.granitemoe import GraniteMoeConfig
from transformers.models.granitemoeshared import GraniteMoeSharedConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from ..loading import MoefiedModel
from ..modeling.ffn_sites import FfnSite
from ..modeling.offload import is_offloaded, tensor_of
from ..modeling.routers import router_facts

# standard deviations of scaled scores
SPREAD = 2.0**-14  # where the softmax selects: ties are then those closer than 1 / 1,000 of it
HALF_SPREAD = 2.0**-12  # in bfloat16, where weights that differ by so little are equal
VANISHING = 2.0**-50  # where the scores select


class ExportFormat:
    """A served MoE architecture: a subclass, and a line of `EXPORT_FORMATS`.

    Attributes:
        name: in `export`.
        architecture: the class that loads it.
        sources: model types whose attention, norms and embeddings it has.
        block: name of the MoE in a layer's checkpoint keys, and `parts` those of (gate, up, down) in an expert.
        exact: whether it computes exactly what the MoEfied model does.
        spread: standard deviation of the scaled scores.
        dense_layers: whether layers may keep a dense FFN.
        shared_experts: whether it has a place for them.
        sliding: whether attention may be limited to a window of the last tokens.
        sliding_by_layer: whether it may be so in some layers only.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    sources: ClassVar[tuple[str, ...]]
    block: ClassVar[str]
    parts: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    exact: ClassVar[bool] = False
    spread: ClassVar[float] = SPREAD
    dense_layers: ClassVar[bool] = True
    shared_experts: ClassVar[bool] = False
    sliding: ClassVar[bool] = True
    sliding_by_layer: ClassVar[bool] = True

    def config(self, model: MoefiedModel) -> PreTrainedConfig:
        """Return the config: the settings that both architectures have, and the experts."""
        known = set(self.config_class().to_dict()) - {"model_type", "architectures", "transformers_version"}
        settings = {n: value for n, value in model.config.to_dict().items() if n in known | {"head_dim", "dtype"}}
        act = model.moe_sites()[0].act
        settings |= {"num_experts_per_tok": act.selection.k, "architectures": [self.architecture]}
        return self.config_class(**settings | self.settings(model, act.router.num_experts, act.expert_size))

    def settings(self, model: MoefiedModel, experts: int, size: int) -> dict[str, Any]:
        """Return the settings that only this architecture has.

        Args:
            experts: how many are routed to, of `size` neurons each.
        """
        raise NotImplementedError

    def tensors(self, model: MoefiedModel) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield keys and tensors of the checkpoint, one FFN at a time."""
        sites = {f"{site.name}.": site for site in model.moe_sites()}
        for name, tensor in own_tensors(model):
            if not name.startswith(tuple(sites)):
                yield name, tensor
        for site in sites.values():
            yield from self.ffn_tensors(model, site, f"{site.name.rpartition('.')[0]}.{self.block}")

    def router(self, model: MoefiedModel, site: FfnSite) -> torch.Tensor:
        """Return the router's matrix (E, d), scaled."""
        norm = tensor_of(model, f"{site.name.rpartition('.')[0]}.post_attention_layernorm.weight").detach()
        spread = HALF_SPREAD if model.dtype == torch.bfloat16 else self.spread
        return scaled(router_weight(site), norm, spread).to(model.dtype)

    def ffn_tensors(self, model: MoefiedModel, site: FfnSite, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield those of one routed FFN; here of an architecture that selects and weighs by a softmax."""
        act = site.act
        yield f"{prefix}.gate.weight", self.router(model, site)
        gate, up, down = matrices(site)
        for expert in range(act.num_experts):
            own = slice(expert * act.expert_size, (expert + 1) * act.expert_size)
            tensors = gate[own], up[own], down[:, own] * act.selection.k
            for part, tensor in zip(self.parts, tensors, strict=True):
                yield f"{prefix}.experts.{expert}.{part}.weight", tensor


class GraniteMoe(ExportFormat):
    """GraniteMoE, an MoE in every layer; GraniteMoE-shared where the model has shared experts.

    Its attention may have biases in all four Linears. Queries, keys and values with biases get an output bias of 0.
    """

    name = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    config_class = GraniteMoeConfig
    sources = ("llama", "mistral", "qwen2", "granite")
    block = "block_sparse_moe"
    exact = True
    spread = VANISHING
    dense_layers = False
    shared_experts = True
    sliding = False

    def config(self, model: MoefiedModel) -> PreTrainedConfig:
        config, act = super().config(model), model.moe_sites()[0].act
        if not act.shared:
            return config
        settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        settings |= {"architectures": ["GraniteMoeSharedForCausalLM"]}
        return GraniteMoeSharedConfig(**settings, shared_intermediate_size=act.shared * act.expert_size)

    def settings(self, model: MoefiedModel, experts: int, size: int) -> dict[str, Any]:
        width = head_dim(model.config)
        return {
            "num_local_experts": experts,
            "intermediate_size": size,
            "head_dim": width,
            "attention_multiplier": model.config.to_dict().get("attention_multiplier", width**-0.5),
            "attention_bias": any(name.endswith(".q_proj.bias") for name in own_names(model)),
        }

    def tensors(self, model: MoefiedModel) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().tensors(model)
        names = own_names(model)
        for bias in (name.replace(".q_proj.", ".o_proj.") for name in names if name.endswith(".q_proj.bias")):
            if bias not in names:
                output = tensor_of(model, bias.replace(".bias", ".weight")).detach()
                yield bias, output.new_zeros(len(output))

    def ffn_tensors(self, model: MoefiedModel, site: FfnSite, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        act = site.act
        gate, up, down = matrices(site)
        yield f"{prefix}.router.layer.weight", self.router(model, site)
        first, routed = act.shared * act.expert_size, (-1, act.expert_size)
        both = torch.cat([each[first:].unflatten(0, routed) for each in (gate, up)], 1)  # (E, 2m, d)
        yield f"{prefix}.input_linear.weight", both
        experts = down[:, first:].t().unflatten(0, routed).transpose(1, 2)  # (E, d, m)
        yield f"{prefix}.output_linear.weight", experts * act.selection.k
        if first:
            prefix = f"{prefix.rpartition('.')[0]}.shared_mlp"
            yield f"{prefix}.input_linear.weight", torch.cat([gate[:first], up[:first]])
            yield f"{prefix}.output_linear.weight", down[:, :first]


class Mixtral(ExportFormat):
    """Every layer is an MoE."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    config_class = MixtralConfig
    sources = ("llama", "mistral")
    block = "block_sparse_moe"
    parts = ("w1", "w3", "w2")
    dense_layers = False

    def settings(self, model: MoefiedModel, experts: int, size: int) -> dict[str, Any]:
        return {"num_local_experts": experts, "intermediate_size": size}


class QwenMoe(ExportFormat):
    """What both Qwen MoEs have."""

    block = "mlp"

    def settings(self, model: MoefiedModel, experts: int, size: int) -> dict[str, Any]:
        dense = set(range(model.config.num_hidden_layers)) - {layer_of(site) for site in model.moe_sites()}
        return {
            "num_experts": experts,
            "moe_intermediate_size": size,
            "norm_topk_prob": True,
            "mlp_only_layers": sorted(dense),
        }


class Qwen2Moe(QwenMoe):
    """It must have a shared expert, which adds nothing here."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    config_class = Qwen2MoeConfig
    sources = ("qwen2",)

    def settings(self, model: MoefiedModel, experts: int, size: int) -> dict[str, Any]:
        return super().settings(model, experts, size) | {"shared_expert_intermediate_size": size}

    def ffn_tensors(self, model: MoefiedModel, site: FfnSite, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().ffn_tensors(model, site, prefix)
        size, (d, _) = site.act.expert_size, site.sizes
        yield f"{prefix}.shared_expert_gate.weight", torch.zeros(1, d, dtype=model.dtype)
        for part, shape in zip(self.parts, ((size, d), (size, d), (d, size)), strict=True):
            yield f"{prefix}.shared_expert.{part}.weight", torch.zeros(shape, dtype=model.dtype)


class Qwen3Moe(QwenMoe):
    """It has no shared expert."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    config_class = Qwen3MoeConfig
    sources = ("qwen3",)
    sliding_by_layer = False


FORMATS = (GraniteMoe(), Mixtral(), Qwen2Moe(), Qwen3Moe())
EXPORT_FORMATS: dict[str, ExportFormat] = {each.name: each for each in FORMATS}


def matrices(site: FfnSite) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return those of a gated FFN: gate (f, d), up (f, d), down (d, f)."""
    weights = site.weights()
    return weights.keys.detach(), weights.up.detach(), weights.down.detach()


def router_weight(site: FfnSite) -> torch.Tensor:
    """Return the router's matrix (E, d)."""
    name = router_facts(site.act.router).export_weight or ""  # which `check_routing` has asked for
    return tensor_of(site.act.router, name).detach()


def head_dim(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_of(site: FfnSite) -> int:
    """Return the number in "model.layers.3.mlp"."""
    return next(int(part) for part in site.name.split(".") if part.isdigit())


def own_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors that are saved, tied ones once, without routers; those that are offloaded are read one by
    one."""
    for name in own_names(model):
        yield name, tensor_of(model, name).detach()


def own_names(model: PreTrainedModel) -> list[str]:
    """Return the names of what `own_tensors` yields."""
    if is_offloaded(model):
        model.tie_weights()  # accelerate has put new objects in the places of those that were tied
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".router." not in name and not name.endswith(".neuron_order"):
            names.setdefault(id(tensor), name)
    return list(names.values())


def scaled(router: torch.Tensor, norm: torch.Tensor, spread: float) -> torch.Tensor:
    """(E, d), (d,) -> (E, d): the router times a power of two that makes its scores small.

    The scores of one token then have a standard deviation of at most `spread`, were the normalised input white. `norm`
    is the scale of that normalisation.
    """
    std = float(((router - router.mean(0)).float() * norm.float()).square().sum(-1).mean().sqrt())
    return router * 2.0 ** math.floor(math.log2(spread / max(std, 1e-12)))
