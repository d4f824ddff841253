"""The tensors of a GGUF file of a MoEfied model, made of those of its dense one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
import numpy as np

from ..loading import MoefiedModel
from ..modeling.ffn_sites import FfnSite
from .dense_gguf import FFN_PARTS, DenseGguf, Type
from .formats import VANISHING, layer_of, router_weight, scaled

NUMBERS = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: np.uint16}  # types that hold a number by itself
NULL_WIDTH = 32  # neurons of a layer of zeros


@dataclass(frozen=True)
class Tensor:
    """A tensor that is going to be written: `make` makes it, as an array that is stored as it is."""

    name: str
    shape: tuple[int, ...]
    type: Any
    make: Callable[[], np.ndarray]


def other_tensors(source: DenseGguf, model: MoefiedModel, architecture: str) -> Iterator[Tensor]:
    """Yield what is not of routed FFNs, as it is stored in the dense file."""
    ffns = {f"blk.{layer_of(site)}.{part}.weight" for site in model.moe_sites() for part in FFN_PARTS}
    for name, tensor in source.tensors.items():
        if name not in ffns:
            new = name.replace("ffn_norm", "post_attention_norm") if architecture == "glm4moe" else name
            yield Tensor(new, tensor.data.shape, tensor.tensor_type, partial(source.data, name))
    if architecture == "step35" and "output.weight" not in source.tensors:  # which it must have
        tensor = source.tensors["token_embd.weight"]
        yield Tensor("output.weight", tensor.data.shape, tensor.tensor_type, partial(source.data, tensor.name))


def null_layer(source: DenseGguf, model: MoefiedModel, architecture: str) -> Iterator[Tensor]:
    """Yield the layer of zeros that `step35` needs."""
    if architecture != "step35":
        return
    layer, (width, _) = model.config.num_hidden_layers, model.moe_sites()[0].sizes
    neurons = null_neurons(source, model)
    for name, tensor in source.tensors.items():
        if name.startswith("blk.0.") and name.split(".")[2] not in FFN_PARTS:
            shape, dtype = tensor.data.shape, tensor.data.dtype
            yield Tensor(
                name.replace("blk.0.", f"blk.{layer}."), shape, tensor.tensor_type, partial(np.zeros, shape, dtype)
            )
    for part in FFN_PARTS:
        shape = (width, neurons) if part == "ffn_down" else (neurons, width)
        yield Tensor(f"blk.{layer}.{part}.weight", shape, Type.F32, partial(np.zeros, shape, np.float32))


def null_neurons(source: DenseGguf, model: MoefiedModel) -> int:
    """Return the width of the FFN of zeros, which is that of all dense layers."""
    every = len(model.moe_sites()) == model.config.num_hidden_layers
    return NULL_WIDTH if every else source.setting("feed_forward_length")


def ffn_tensors(source: DenseGguf, site: FfnSite, order: np.ndarray) -> Iterator[Tensor]:
    """Yield router and experts of one FFN; without shared experts, one of zeros, which must be there."""
    act, block = site.act, f"blk.{layer_of(site)}"
    router = router_weight(site).float().cpu()
    router = scaled(router, router.new_ones(site.sizes[0]), VANISHING)
    yield Tensor(f"{block}.ffn_gate_inp.weight", tuple(router.shape), Type.F32, router.numpy)
    experts = act.router.num_experts
    yield Tensor(f"{block}.exp_probs_b.bias", (experts,), Type.F32, partial(np.zeros, experts, np.float32))
    size, neurons, first = act.expert_size, site.sizes[1], act.shared * act.expert_size
    for part in FFN_PARTS:
        kind = source.tensors[f"{block}.{part}.weight"].tensor_type
        cut = partial(cut_down if part == "ffn_down" else cut_rows, source, site, part, order)
        made = partial(cut, first, neurons, experts)
        yield Tensor(f"{block}.{part}_exps.weight", (experts, *shape_of(source, site, part, size)), kind, made)
        shape = shape_of(source, site, part, max(first, size))
        dtype = source.tensors[f"{block}.{part}.weight"].data.dtype
        own = partial(cut, 0, first, None) if first else partial(np.zeros, shape, dtype)
        yield Tensor(f"{block}.{part}_shexp.weight", shape, kind, own)


def shape_of(source: DenseGguf, site: FfnSite, part: str, neurons: int) -> tuple[int, int]:
    """Return the shape in which some neurons of a part are stored: rows, and numbers or bytes."""
    tensor = source.tensors[f"blk.{layer_of(site)}.{part}.weight"]
    rows, columns = tensor.data.shape
    return (rows, columns * neurons // site.sizes[1]) if part == "ffn_down" else (neurons, columns)


def cut_rows(
    source: DenseGguf, site: FfnSite, part: str, order: np.ndarray, first: int, last: int, experts: int | None
) -> np.ndarray:
    """Return the rows of neurons from `first` to `last` (n, columns), or of experts (E, m, columns), unchanged."""
    data = source.data(f"blk.{layer_of(site)}.{part}.weight")[order[first:last]]
    return data if experts is None else data.reshape(experts, -1, data.shape[-1])


def cut_down(
    source: DenseGguf, site: FfnSite, part: str, order: np.ndarray, first: int, last: int, experts: int | None
) -> np.ndarray:
    """Return the columns of neurons from `first` to `last` (d, n), or of experts (E, d, m).

    Numbers are moved; blocks of numbers are quantised anew, from the model's.
    """
    tensor = source.tensors[f"blk.{layer_of(site)}.{part}.weight"]
    if tensor.tensor_type in NUMBERS:
        columns = tensor.data.view(NUMBERS[tensor.tensor_type])[:, order[first:last]]
    else:
        columns = site.weights().down[:, first:last].detach().float().cpu().numpy()
    if experts is not None:
        columns = columns.reshape(len(columns), experts, -1).swapaxes(0, 1)
    columns = np.ascontiguousarray(columns)
    if tensor.tensor_type not in NUMBERS:
        return gguf.quantize(columns, tensor.tensor_type)
    return columns.view(tensor.data.dtype)


def down_of(site: FfnSite) -> str:
    """Return the name of an FFN's `down` in a dense file."""
    return f"blk.{layer_of(site)}.ffn_down.weight"
