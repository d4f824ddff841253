"""Adapters of a dense model (LoRA, IA3, LoHa, trained Linears), put into the order of neurons of its MoEfied self."""

import shutil
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import MoefyError
from ..io import written_whole
from ..loading import MoefiedModel, check_moefied
from ..modeling.adapters import ffn_linears, is_of_moefied
from ..modeling.ffn_sites import FfnSite

# name of a tensor -> its dimensions that count what the Linear gives and what it reads
DIMENSIONS: dict[str, tuple[int | None, int | None]] = {
    "lora_A.weight": (None, 1),
    "lora_B.weight": (0, None),
    "lora_B.bias": (0, None),
    "lora_magnitude_vector": (0, None),
    "hada_w1_a": (0, None),
    "hada_w1_b": (None, 1),
    "hada_w2_a": (0, None),
    "hada_w2_b": (None, 1),
    "ia3_l": (0, 1),
    "weight": (0, 1),
    "bias": (0, None),
}
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def permute_adapter_(model: PeftModel, adapter_name: str = "default") -> None:
    """Let an adapter that was trained on the dense model fit its MoEfied self, in place.

    Conversion permutes neurons, so what an adapter learned of each (rows of LoRA's B on `up` and `gate`, columns of A
    on `down`) has to move with them. Adapters of attention alone, and those trained on the MoEfied model, fit as they
    are. Call it once.

    Args:
        model: a MoEfied model with the adapter, as `PeftModel.from_pretrained(moefied, "my-lora")` loads it.
        adapter_name: of the adapter.

    Raises:
        MoefyError: the model is not MoEfied, has no such adapter or one that fits already, does not know the order its
            neurons had (it was converted by an older version), or the adapter mixes neurons (VeRA, OFT, LoKr on an
            FFN): merge that into the dense model before conversion. Nothing is changed then.

    Example:
        >>> model = PeftModel.from_pretrained(load("my-moe"), "my-lora")
        >>> permute_adapter_(model)
    """
    if not isinstance(model, PeftModel) or adapter_name not in model.peft_config:
        has = ", ".join(model.peft_config) if isinstance(model, PeftModel) else "none that PeftModel has loaded"
        raise MoefyError(
            f"the model has no adapter {adapter_name!r}; it has: {has} (moefy permute-adapter takes files)"
        )
    base = check_moefied(cast(PreTrainedModel, model.get_base_model()))
    check_of_dense(model.peft_config[adapter_name], base)
    permuted = permuted_adapter(get_peft_model_state_dict(model, adapter_name=adapter_name), base)
    model.peft_config[adapter_name].base_model_name_or_path = base.name_or_path
    set_peft_model_state_dict(model, permuted, adapter_name=adapter_name)


def permute_adapter(adapter: str | Path, model: PreTrainedModel, output_dir: str | Path) -> Path:
    """The same for an adapter's checkpoint (a folder, or a Hub id): write one that fits the MoEfied model.

    Raises:
        MoefyError: see `permute_adapter_`; or `output_dir` exists.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise MoefyError(f"{output_dir} exists: choose another output_dir")
    config = PeftConfig.from_pretrained(str(adapter))
    model = check_moefied(model)
    check_of_dense(config, model)
    permuted = permuted_adapter(load_peft_weights(str(adapter), device="cpu"), model)
    config.base_model_name_or_path = model.name_or_path
    with written_whole(output_dir) as folder:
        if Path(adapter).is_dir():  # a tokenizer, a card
            shutil.copytree(adapter, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("adapter_model.*"))
        config.save_pretrained(str(folder))
        save_file({name: value.contiguous() for name, value in permuted.items()}, folder / WEIGHTS, {"format": "pt"})
    return output_dir


def check_of_dense(config: PeftConfig, model: MoefiedModel) -> None:
    """
    Raises:
        MoefyError: the adapter was trained on the MoEfied model, or is permuted already.
    """
    if is_of_moefied(config, model):
        raise MoefyError(
            f"this adapter was trained on, or permuted for, {config.base_model_name_or_path!r}, a MoEfied model: it "
            "fits as it is"
        )


def permuted_adapter(state: dict[str, torch.Tensor], model: MoefiedModel) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors in the order of a MoEfied model's neurons, by the names that peft saves them under.

    Raises:
        MoefyError: see `permute_adapter_`.
    """
    permuted = dict(state)
    for site in model.moe_sites():
        for part, path in ffn_linears(site).items():
            start = f"{PREFIX}{path}."
            for name in [each for each in state if each.startswith(start)]:
                permuted[name] = in_order(site, part, name.removeprefix(start), state[name])
    return permuted


def in_order(site: FfnSite, part: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return one of the adapter's tensors on one of an FFN's Linears, in the order of the neurons now."""
    kind = name.removeprefix("base_layer.")
    if kind.startswith("lora_magnitude_vector"):
        kind = "lora_magnitude_vector"
    if kind not in DIMENSIONS:
        raise MoefyError(
            f"{name} of {site.name} mixes neurons, or is not known here, and cannot be permuted: merge this adapter "
            "into the dense model (merge_and_unload), and convert that"
        )
    given, read = DIMENSIONS[kind]
    if kind == "weight" and isinstance(getattr(site, part), Conv1D):
        given, read = read, given
    dim = read if part == "down" else given
    if dim is None or tensor.shape[dim] == 1:  # one number for all neurons
        return tensor
    order = order_of(site).to(tensor.device)
    blocks = site.spec.parts if part == "up" else 1
    width = tensor.shape[dim] // blocks
    if tensor.shape[dim] % blocks or int(order.max()) >= width:
        raise MoefyError(
            f"{name} of {site.name} has shape {tuple(tensor.shape)}, too few for neurons up to {int(order.max())}: "
            "this adapter is of another model"
        )
    return tensor.index_select(dim, torch.cat([order + block * width for block in range(blocks)]))


def order_of(site: FfnSite) -> torch.Tensor:
    """Return the position (f,) that each neuron had in the dense model."""
    order = getattr(site.act, "neuron_order", None)
    if order is None or int(order.min()) < 0:
        raise MoefyError(
            f"{site.name}: this checkpoint does not know the order of neurons in its dense model, as an older version "
            "converted it: merge the adapter into the dense model, and convert that; or convert it again"
        )
    return order.long()
