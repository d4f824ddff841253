"""Write a MoEfied model as a GGUF file that llama.cpp serves unpatched, from the GGUF file of its dense model.

llama.cpp's `glm4moe` has the attention of Llama and Qwen, a place for shared experts, and a gating that selects by raw
scores, then weighs the selected experts by a softmax of theirs (`expert_gating_func` 3). A router times a power of two
selects the same experts. Its scores are then so small that each weight is 1 / k, and `expert_weights_scale` k makes
that 1.

Llama 3's scaling of positions needs `rope_freqs`, which `glm4moe` has not. `step35` has; it wants a layer of sliding
attention, and gets one more, of zeros, which adds nothing.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..errors import MoefyError
from ..io import written_file
from ..loading import MoefiedModel
from .dense_gguf import FFN_PARTS, DenseGguf, Type, check_same_model, neuron_order, open_dense
from .formats import layer_of
from .gguf_tensors import NUMBERS, Tensor, down_of, ffn_tensors, null_layer, null_neurons, other_tensors

SOFTMAX_OF_SELECTED = 3  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT
NULL_WINDOW = 256  # tokens that the layer of zeros sees
# llama.cpp's graph, fitted to the limits that were found by trying: nodes and leaves of a layer (beside two nodes for
# each expert, biases, and norms of heads), those outside of layers, and those of a layer of zeros
NODES, LEAVES, OTHERS, NULL_LAYER = 52, 17, 15, 38
TABLES = (1031, 2053, 4099, 8209, 16411, 32771, 65537, 131101)  # sizes of llama.cpp's tables
MOST_EXPERTS, MOST_LAYERS = 1024, 512  # llama.cpp's LLAMA_MAX_EXPERTS and LLAMA_MAX_LAYERS


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Attributes:
        output: the file.
        architecture: llama.cpp's, "glm4moe" or "step35".
        budget: llama.cpp's flag that sets the number of experts, here to what the file has.
        most_experts: the largest number of routed experts that llama.cpp's graph has room for in this model.
        requantised: the type of the `down` projections whose rows an expert takes in parts: quantised anew from the
            model's own numbers; None: no number has changed.
    """

    output: Path
    architecture: str
    budget: str
    most_experts: int
    requantised: str | None


def write_gguf(model: MoefiedModel, output: Path, dense: str | Path | None) -> GgufReport:
    """Write the model at its budget, with the metadata, tokenizer and types of its dense GGUF file.

    Args:
        model: MoEfied, with a linear router and one k for all layers, which the caller has checked.
        output: the file; must not exist.
        dense: the GGUF file of the dense model, or of what `export(to="dense")` wrote.

    Raises:
        MoefyError: llama.cpp cannot compute this model, or the dense file is not the model's.
        FileExistsError: there is something at `output`.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output")
    check_ffns(model)
    source = open_dense(dense)
    check_same_model(source, model)
    orders = {site.key: neuron_order(source, site) for site in model.moe_sites()}
    check_types(source, model)
    architecture = "step35" if "rope_freqs.weight" in source.tensors else "glm4moe"
    check_layers(model, architecture)
    tensors = [*other_tensors(source, model, architecture), *null_layer(source, model, architecture)]
    for site in model.moe_sites():
        tensors += ffn_tensors(source, site, orders[site.key])
    most = check_graph(source, model, len(tensors))
    write(source, settings_of(source, model, architecture), architecture, tensors, output)
    k = model.moe_sites()[0].act.selection.k
    flags = (f"{architecture}.expert_used_count=int:{k}", f"{architecture}.expert_weights_scale=float:{k}")
    downs = {source.tensors[down_of(site)].tensor_type for site in model.moe_sites()} - NUMBERS.keys()
    requantised = Type(downs.pop()).name if downs else None
    return GgufReport(output, architecture, "--override-kv " + ",".join(flags), most, requantised)


def check_ffns(model: MoefiedModel) -> None:
    """Check that llama.cpp's experts compute what the model's FFNs do.

    Raises:
        MoefyError: an FFN is not gated, or not by SiLU, or has biases or a norm.
    """
    for site in model.moe_sites():
        weights, probe = site.weights(), torch.linspace(-4, 4, 33)
        if weights.gate is None or not torch.allclose(weights.act(probe), F.silu(probe), atol=1e-6):
            raise MoefyError(f"{site.name}: llama.cpp's experts are gated by SiLU (SwiGLU), this FFN is not")
        if site.spec.together is not None:
            raise MoefyError(f"{site.name} has a {site.spec.together} between its projections, llama.cpp's have none")
        if any(bias is not None for bias in (weights.gate_bias, weights.up_bias, site.down.bias)):
            raise MoefyError(f"{site.name} has biases, llama.cpp's experts have none")


def check_types(source: DenseGguf, model: MoefiedModel) -> None:
    """Check the types of the FFNs' tensors.

    Raises:
        MoefyError: one cannot be cut into experts; says which types can.
    """
    size = model.moe_sites()[0].act.expert_size
    for site in model.moe_sites():
        for part in FFN_PARTS:
            name = f"blk.{layer_of(site)}.{part}.weight"
            kind = source.tensors[name].tensor_type
            if kind not in NUMBERS and kind != Type.Q8_0:
                raise MoefyError(
                    f"{source.path}: {name} is {Type(kind).name}; F32, F16, BF16 and Q8_0 can be cut into experts"
                )
            if kind == Type.Q8_0 and part == "ffn_down" and size % 32:
                raise MoefyError(
                    f"Q8_0 rounds numbers in blocks of 32, and an expert has {size} neurons: give a dense "
                    "GGUF file of F32, F16 or BF16, or convert with expert_size=32"
                )


def check_layers(model: MoefiedModel, architecture: str) -> None:
    """Check that dense layers are where the architecture may have them.

    Raises:
        MoefyError: they are not, or there are too many layers or experts.
    """
    routed, act = {layer_of(site) for site in model.moe_sites()}, model.moe_sites()[0].act
    layers = model.config.num_hidden_layers
    if architecture == "glm4moe" and routed != set(range(layers - len(routed), layers)):
        raise MoefyError("llama.cpp's glm4moe has dense layers before all others only: convert with layers=None")
    if act.router.num_experts > MOST_EXPERTS:
        raise MoefyError(f"llama.cpp has at most {MOST_EXPERTS} experts, this model {act.router.num_experts}")
    if layers >= MOST_LAYERS:
        raise MoefyError(f"llama.cpp has at most {MOST_LAYERS} layers, this model {layers}")


def check_graph(source: DenseGguf, model: MoefiedModel, tensors: int) -> int:
    """Return the largest number of routed experts that a token may compute in llama.cpp, a lower bound.

    llama.cpp (v0.5.0) has room for 8 nodes per tensor of the file, at least 1,024, and for as many nodes and leaves
    together as a table has entries. An expert takes two nodes in each layer: its view, and its sum.

    Args:
        source: the dense file.
        model: the model.
        tensors: how many the new file has.

    Raises:
        MoefyError: the model computes more.
    """
    layers, k = model.config.num_hidden_layers, model.moe_sites()[0].act.selection.k
    extra = NULL_LAYER if "rope_freqs.weight" in source.tensors else 0
    own = [name.split(".", 2)[2] for name in source.tensors if name.startswith("blk.0.")]
    biases, norms = (sum(name.endswith(end) for name in own) for end in (".bias", "_norm.weight"))
    norms -= 2  # before attention and before the FFN
    room = max(1024, 8 * tensors)
    entries = next(size for size in TABLES if size >= room)
    by_nodes = (room - OTHERS - extra) / layers - (NODES + biases + 2 * norms)
    by_entries = (entries - OTHERS - extra) / layers - (NODES + LEAVES + 2 * biases + 3 * norms)
    most = min(int(min(by_nodes, by_entries) // 2), MOST_EXPERTS)
    if k > most:
        raise MoefyError(
            f"llama.cpp's graph of these {layers} layers has room for {most} experts a token, and the model computes "
            f"{k}: set_selection(k={most}), or convert with a larger expert_size, so that fewer are more"
        )
    return most


def settings_of(source: DenseGguf, model: MoefiedModel, architecture: str) -> dict[str, Any]:
    """Return what the file says of the experts, and what differs from the dense one."""
    act, layers, width = model.moe_sites()[0].act, model.config.num_hidden_layers, source.head_dim
    settings = {
        "vocab_size": len(source.tensors["token_embd.weight"].data),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "expert_count": act.router.num_experts,
        "expert_used_count": act.selection.k,
        "expert_feed_forward_length": act.expert_size,
        "expert_shared_count": max(act.shared, 1),
        "leading_dense_block_count": layers - len(model.moe_sites()),
        "expert_weights_scale": float(act.selection.k),
        "expert_weights_norm": False,
        "expert_gating_func": SOFTMAX_OF_SELECTED,
    }
    if architecture == "step35":
        settings |= {
            "block_count": layers + 1,
            "feed_forward_length": null_neurons(source, model),
            "rope.dimension_count": 2 * width,  # of which it turns half
            "rope.dimension_count_swa": width,
            "expert_shared_feed_forward_length": max(act.shared, 1) * act.expert_size,
            "attention.sliding_window": NULL_WINDOW,
            "attention.sliding_window_pattern": [False] * layers + [True],
        }
    return settings


def write(source: DenseGguf, settings: dict[str, Any], architecture: str, tensors: list[Tensor], output: Path) -> None:
    """Write a GGUF file under a temporary name, one tensor in memory at a time, and rename it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_file(output) as temporary, closing(gguf.GGUFWriter(temporary, architecture)) as writer:
        copy_metadata(source, writer, settings)
        for tensor in tensors:
            dtype = np.dtype({Type.F32: np.float32, Type.F16: np.float16}.get(tensor.type, np.uint8))
            nbytes = int(np.prod(tensor.shape)) * dtype.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, dtype, nbytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tqdm(tensors, desc="tensors", unit="tensor", disable=None):
            writer.write_tensor_data(np.ascontiguousarray(tensor.make()))


def copy_metadata(source: DenseGguf, writer: gguf.GGUFWriter, settings: dict[str, Any]) -> None:
    """Give a file the metadata of the dense one, with the settings of its own architecture.

    Args:
        source: the dense file.
        writer: of the new file.
        settings: names below the architecture's, and values.
    """
    own = f"{source.architecture}."
    for name, found in source.reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name.removeprefix(own) in settings:
            continue
        name = f"{writer.arch}.{name.removeprefix(own)}" if name.startswith(own) else name
        array = found.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, found.contents(), found.types[0], found.types[-1] if array else None)
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    for name, value in settings.items():
        kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else kinds[type(value)]
        writer.add_key_value(f"{writer.arch}.{name}", value, kind, kinds[bool] if isinstance(value, list) else None)
    writer.data_alignment = source.reader.alignment
