"""Write a MoEfied model as a checkpoint of an architecture that serving engines know, or as its plain dense one."""

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MoefyError
from ..io import written_whole
from ..loading import MoefiedModel, check_moefied
from ..modeling.offload import is_offloaded
from ..modeling.routers import router_facts
from ..modeling.section import NAME, Section
from ..modeling.selection import selection_facts
from .formats import EXPORT_FORMATS, ExportFormat, own_tensors
from .onnx_export import check_onnx, write_onnx

OTHERS = ("onnx", "gguf", "dense")  # targets that are no served architecture
OFFLOADED_SHARD = 1_000_000_000  # bytes
LLAMA_CPP = ("llama", "mistral", "qwen2", "qwen3")  # what "gguf" is written of

if TYPE_CHECKING:
    from .llama_cpp import GgufReport


def export(
    model: PreTrainedModel,
    output_dir: str | Path,
    to: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = 5_000_000_000,
    int8: bool = False,
    batches: Iterable[Mapping[str, Any]] | None = None,
    dense: str | Path | None = None,
    timing: bool = True,
    progress: bool = True,
) -> Path:
    """Write what `model` computes at the budget it has, for engines that know nothing of MoEfication.

    Args:
        model: MoEfied. Served architectures want a linear router, `top_k` and one k for all layers.
        output_dir: must not exist, or be empty; for "gguf" the file, which must not exist.
        to: "granitemoe" (of Llama, Mistral, Qwen2 and Granite), exact; "mixtral" (of Llama and Mistral), "qwen2_moe",
            "qwen3_moe", whose softmax over experts comes close only; "onnx" (models of texts or images, for ONNX
            Runtime) and "gguf" (of Llama, Mistral, Qwen2 and Qwen3, for llama.cpp), exact; or "dense" (any model: all
            its neurons, no routers). By default the first served one that has its attention.
        tokenizer: saved beside the weights.
        max_shard_bytes: size of a weights file, 1 GB at most of offloaded weights; so much memory is needed besides.
        int8: of "onnx": whether matrices become 8-bit; routers stay in float32.
        batches: of "onnx": inputs on which the graphs are compared with the model; made up by default.
        dense: the GGUF file of the dense model, which "gguf" needs: its metadata, tokenizer and types are kept.
        timing: of "onnx": whether its graphs are timed against the dense model's, which are written for that.
        progress: of "onnx": whether a bar is shown.

    Returns:
        output_dir.

    Raises:
        MoefyError: the model is not MoEfied, or the format cannot express it; says why, and which conversion could be.
            Or `dense` is missing, or not this model's.
        VerificationError: an ONNX graph gives something else than the model.
        FileExistsError: there is something in output_dir.

    Example:
        >>> export(model, "served", to="mixtral", tokenizer=tokenizer)
    """
    output_dir, model = Path(output_dir), check_moefied(model)
    if to == "gguf":
        return export_gguf(model, output_dir, dense).output
    if dense is not None:
        raise MoefyError("dense is for to='gguf' alone")
    if to != "onnx" and (int8 or batches is not None or not timing):
        raise MoefyError(f"int8, batches and timing belong to to='onnx', not to {to!r}")
    export_format = checked_format(model, to)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not empty: choose another output_dir")
    with written_whole(output_dir) as folder:
        write_settings(model, folder, export_format, tokenizer)
        if to == "onnx":
            write_onnx(model, folder, int8, batches, timing, progress)
            return output_dir
        tensors = own_tensors(model) if export_format is None else export_format.tensors(model)
        write_shards(tensors, folder, shard_bytes(model, max_shard_bytes))
    return output_dir


def shard_bytes(model: PreTrainedModel, wanted: int) -> int:
    """Return the size of a weights file: small ones where weights are not in memory."""
    return min(wanted, OFFLOADED_SHARD) if is_offloaded(model) else wanted


def targets_of(model: PreTrainedModel) -> list[str]:
    """Return the targets that have an architecture; how a model is routed may still rule some of them out."""
    kind = model.config.model_type
    targets = [name for name, each in EXPORT_FORMATS.items() if kind in each.sources]
    if model.main_input_name in ("input_ids", "pixel_values") and not model.config.sub_configs:
        targets.append("onnx")
    return [*targets, *["gguf"] * (kind in LLAMA_CPP), "dense"]


def checked_format(model: MoefiedModel, to: str | None) -> ExportFormat | None:
    """Return the served format that a model is written in; None for a target that is none.

    Raises:
        MoefyError: there is none, or it has no place for all that the model does.
    """
    if to == "onnx":
        if is_offloaded(model):
            raise MoefyError("a graph is traced with the model in memory: load it without offloading for to='onnx'")
        check_onnx(model)
    if to in OTHERS:
        return None
    export_format = choose_format(model, to)
    check_expressible(model, export_format)
    return export_format


def write_settings(
    model: MoefiedModel, folder: Path, export_format: ExportFormat | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write what belongs beside the weights: the config of the format, or of the dense model, and the tokenizer."""
    config = dense_config(model) if export_format is None else export_format.config(model)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def export_gguf(model: PreTrainedModel, output: Path, dense: str | Path | None) -> "GgufReport":
    """Write a GGUF file for llama.cpp; return what was written, with the flags that set the budget.

    Raises:
        MoefyError: see `export`; or the package gguf is not installed.
        FileExistsError: there is something at `output`.
    """
    model = check_moefied(model)
    if find_spec("gguf") is None:
        raise MoefyError("to='gguf' needs gguf: pip install 'moefy-hf[gguf]'")
    from .llama_cpp import write_gguf

    check_routing(model, "llama.cpp", shared_experts=True)
    check_sizes(model)
    return write_gguf(model, output, dense)


def choose_format(model: PreTrainedModel, to: str | None) -> ExportFormat:
    """Return the export format that was asked for, or the first that has the model's attention.

    Raises:
        MoefyError: there is no such format, or none for this architecture or head.
    """
    model_type = model.config.model_type
    fitting = [name for name, each in EXPORT_FORMATS.items() if model_type in each.sources]
    if to is not None and to not in EXPORT_FORMATS:
        raise MoefyError(f"unknown target {to!r}; choose from {', '.join([*EXPORT_FORMATS, *OTHERS])}")
    if to is None and not fitting or to is not None and to not in fitting:
        exportable = "; ".join(f"{', '.join(each.sources)} to {name}" for name, each in EXPORT_FORMATS.items())
        others = "models of texts or of images to 'onnx'; any to 'dense'"
        raise MoefyError(f"a {model_type} model cannot become {to or 'a served MoE'}: {exportable}; {others}")
    if not model._get_name().endswith("ForCausalLM"):
        raise MoefyError(f"{model._get_name()} is no causal language model, which is what the served MoEs are")
    return EXPORT_FORMATS[to or next(name for name in fitting if EXPORT_FORMATS[name].sliding or not slides(model))]


def slides(model: PreTrainedModel) -> bool:
    """Whether attention is limited to a window of the last tokens."""
    return getattr(model.config, "sliding_window", None) is not None


def check_expressible(model: MoefiedModel, export_format: ExportFormat) -> None:
    """Check that a format has a place for all that the model does.

    Raises:
        MoefyError: it has not; says what to change.
    """
    check_routing(model, export_format.architecture, export_format.shared_experts)
    check_layers(model, export_format)
    if (
        "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
        and not export_format.sliding_by_layer
    ):
        raise MoefyError(f"{export_format.architecture} has no sliding attention in some of its layers only")
    if slides(model) and not export_format.sliding:
        others = (each for each in EXPORT_FORMATS.values() if each.sliding and model.config.model_type in each.sources)
        remedy = "".join(f": export to {each.name!r}, which has" for each in others)
        raise MoefyError(f"{export_format.architecture} has no sliding attention{remedy}")
    if model.dtype == torch.float16:
        raise MoefyError("float16 cannot hold the scaled router: export in float32 or bfloat16, e.g. model.float()")


def check_routing(model: MoefiedModel, architecture: str, shared_experts: bool) -> None:
    """Check the router, the selection, and what is added to selected experts.

    Args:
        model: MoEfied.
        architecture: what is to express it.
        shared_experts: whether that has a place for them.

    Raises:
        MoefyError: see `check_expressible`.
    """
    section, acts = Section(model.config), [site.act for site in model.moe_sites()]
    if router_facts(acts[0].router).export_weight is None:
        raise MoefyError(
            f"served MoEs have a linear router, this model a {section.router!r} one: convert with router='linear'"
        )
    if not selection_facts(acts[0].selection).exportable:
        raise MoefyError(
            f"served MoEs compute the same number of experts for every token, this model selects by "
            f"{section.selection['type']!r}: model.set_selection(type='top_k', k=...) first"
        )
    if acts[0].shared and not shared_experts:
        fitting = (each for each in EXPORT_FORMATS.values() if model.config.model_type in each.sources)
        others = ", ".join(repr(each.name) for each in fitting if each.shared_experts)
        remedy = f"export to {others}, which has" if others else "convert with shared_experts=0"
        raise MoefyError(f"{architecture} has no place for {acts[0].shared} shared experts: {remedy}")
    if section.compensation:
        raise MoefyError("served MoEs have no mean compensation: convert with compensation=False")
    budgets = {act.k for act in acts}
    if len(budgets) > 1:
        raise MoefyError(
            f"layers compute {min(budgets)} to {max(budgets)} experts; served MoEs have one k for all: "
            "model.set_selection(k=..., allocation='uniform') first"
        )


def check_layers(model: MoefiedModel, export_format: ExportFormat) -> None:
    """Check sizes, dense layers and biases.

    Raises:
        MoefyError: see `check_expressible`.
    """
    check_sizes(model)
    sites = model.moe_sites()
    if len(sites) < model.config.num_hidden_layers and not export_format.dense_layers:
        raise MoefyError(
            f"{len(sites)} of {model.config.num_hidden_layers} layers are MoEfied, and "
            f"{export_format.architecture} has no dense ones: convert with layers=None"
        )
    biased = [name for site in sites for name in ("gate", "up", "down") if getattr(site, name).bias is not None]
    attention = getattr(model.config, "attention_bias", False) and not hasattr(
        export_format.config_class(), "attention_bias"
    )
    if biased or attention:
        where = "the attention" if attention else f"the FFNs ({', '.join(dict.fromkeys(biased))})"
        raise MoefyError(f"{export_format.architecture} has no biases, this model has some in {where}")


def check_sizes(model: MoefiedModel) -> None:
    """Check that experts are as many and as large in all layers.

    Raises:
        MoefyError: they are not.
    """
    if len({(site.act.num_experts, site.sizes[1]) for site in model.moe_sites()}) > 1:
        raise MoefyError("experts differ between layers in number or size; served MoEs have one size for all")


def dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of the dense model that a MoEfied one stands for."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in (NAME, "auto_map")}
    return type(model.config)(**settings | {"architectures": [model._get_name()]})


def write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, max_bytes: int) -> None:
    """Write safetensors files as save_pretrained names them, with an index where there is more than one."""
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
