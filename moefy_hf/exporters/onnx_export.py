"""Write a MoEfied encoder for ONNX Runtime, in files that are named as optimum names them."""

import contextlib
import json
import logging as standard_logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import MoefyError, UnsupportedModel, VerificationError
from ..loading import MoefiedModel
from ..measure.contexts import evaluating
from ..measure.made_up_inputs import Batch, made_up_batch
from .onnx_ffn import check_ffn, traced_as_operators

FACTS = "moefy_onnx.json"
OPSET = 20  # the first with Gelu
LARGEST_FILE = 1_800_000_000  # bytes of weights: a protobuf file ends at 2 GB
CLOSE = 1e-3  # largest difference, of the largest output: more is another function, not another order of sums
INT8_CLOSE = (
    0.25  # mean difference, of the mean output: bytes cost a few percent, and tokens near a tie route otherwise
)
TEXT = {"input_ids": ("batch_size", "sequence_length")}
TEXT |= {"attention_mask": TEXT["input_ids"], "token_type_ids": TEXT["input_ids"]}
CHOICES = ("batch_size", "num_choices", "sequence_length")


def check_onnx(model: MoefiedModel) -> None:
    """Check, before anything is written, that a model can be exported for ONNX Runtime.

    Raises:
        MoefyError: a package is missing, or the model is none that can be; says what to change.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise MoefyError(f"ONNX export needs {', '.join(missing)}: pip install 'moefy-hf[onnx]'")
    if model.config.is_encoder_decoder or model.can_generate():
        raise MoefyError(f"{model._get_name()} generates text; only encoders are exported to ONNX, with any head")
    if model.dtype != torch.float32:
        raise MoefyError(f"this model is {model.dtype}; ONNX is written from float32: model.float() first")
    if model.device.type != "cpu":
        raise MoefyError(f"this model is on {model.device.type}; ONNX is written from the CPU: model.cpu() first")
    for site in model.moe_sites():
        check_ffn(site)


def write_onnx(
    model: MoefiedModel, folder: Path, int8: bool = False, batches: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Write `model.onnx` and what is known of it, `moefy_onnx.json`, to a folder.

    Args:
        model: it has passed `check_onnx`.
        folder: that gets the files.
        int8: whether matrices become 8-bit; routers stay in float32.
        batches: inputs on which the graph is compared with the model; made up by default.

    Returns:
        the facts: the largest difference as a share of the largest output, the mean one as a share of the mean output,
            and the operator of each FFN.

    Raises:
        UnsupportedModel: torch.onnx cannot write its graph, or its inputs are neither texts nor images.
        VerificationError: the graph gives something else than the model.
    """
    import onnx

    with masked(model):
        example = inputs_for(model, made_up_batch(model))
        checked = [inputs_for(model, batch) for batch in batches] if batches is not None else made_up_batches(model)
        outputs = [named_outputs(model, batch) for batch in checked]
        graph, operators = graph_of(model, example, list(outputs[0]), int8)
    path = folder / "model.onnx"
    large = sum(each.numel() * each.element_size() for each in model.parameters()) > LARGEST_FILE
    save_options: dict[str, Any] = {"save_as_external_data": large, "location": "model.onnx_data"} if large else {}
    if int8:
        quantise(graph, path, large)
    else:
        onnx.save(graph, path, **save_options)
    largest, mean = differences(path, checked, outputs)
    if not (mean <= INT8_CLOSE if int8 else largest <= CLOSE):
        raise VerificationError(
            f"in ONNX Runtime this {model._get_name()} differs by {largest:.1e} of its largest output, and by "
            f"{mean:.1e} on average, which is no rounding: nothing was written"
        )
    facts = {"largest_difference": largest, "mean_difference": mean, "int8": int8, "operators": operators}
    (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


def graph_of(model: MoefiedModel, example: Batch, outputs: list[str], int8: bool) -> tuple[Any, dict[str, str]]:
    """Return the ONNX model of a model with routed FFNs as operators, and which these are.

    Raises:
        UnsupportedModel: torch.onnx cannot write it.
    """
    from .onnx_experts import split_experts

    axes = [axes_of(name, value) for name, value in example.items()]
    shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in names} for names in axes)
    with traced_as_operators(model, int8) as operators, quiet_exporter():
        try:
            program = torch.onnx.export(
                Positional(model, list(example), outputs).eval(),
                tuple(example.values()),
                input_names=list(example),
                output_names=outputs,
                dynamic_shapes={"values": shapes},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # of torch.export or onnxscript, about anything in the model's own code
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedModel(f"torch.onnx cannot write a {model._get_name()}: {reason}") from error
    assert program is not None
    graph = program.model_proto
    split_experts(graph)
    name_axes(graph, axes)
    return graph, operators


class Positional(nn.Module):
    """A model that takes tensors in order, and gives some of its outputs in order."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(**dict(zip(self.inputs, values, strict=True)), return_dict=True)
        return tuple(output[name] for name in self.outputs)


def inputs_for(model: MoefiedModel, batch: Mapping[str, Any]) -> Batch:
    """Return the inputs of an exported model, of a batch: also the token types that a tokenizer would give.

    Raises:
        UnsupportedModel: they are neither texts nor images.
    """
    named = {name: batch[name] for name in (*TEXT, "pixel_values") if name in batch}
    if "input_ids" in named and "pixel_values" not in named:
        named.setdefault("attention_mask", torch.ones_like(named["input_ids"]))
        if getattr(model.config, "type_vocab_size", 0) > 1:
            named.setdefault("token_type_ids", torch.zeros_like(named["input_ids"]))
    elif list(named) != ["pixel_values"]:
        names = ", ".join(batch)
        raise UnsupportedModel(f"{model._get_name()} reads {names}: ONNX is written of models of texts or of images")
    return named


def made_up_batches(model: MoefiedModel) -> list[Batch]:
    """Return random inputs: one row and three, in two lengths; the last of three texts is padded."""
    found = [inputs_for(model, made_up_batch(model, tokens=t, batch=b, seed=b)) for b, t in ((1, 11), (3, 16))]
    if "attention_mask" in found[1]:
        found[1]["attention_mask"] = found[1]["attention_mask"].clone()
        found[1]["attention_mask"][-1, ..., -3:] = 0
    return found


@torch.no_grad()
def named_outputs(model: MoefiedModel, batch: Batch) -> Batch:
    """Return the output tensors of a model, by their names.

    Raises:
        UnsupportedModel: it returns a cache, which is for decoders.
    """
    with evaluating(model):
        output = model(**batch, return_dict=True)
    if {"cache", "past_key_values"} & {*output.keys()}:  # the second is what older versions of transformers call it
        raise UnsupportedModel(f"{model._get_name()} is a decoder with a cache; only encoders are exported to ONNX")
    return {name: value for name, value in output.items() if torch.is_tensor(value) and value.is_floating_point()}


def axes_of(name: str, value: torch.Tensor) -> dict[int, str]:
    """Return which axes of an input may have any size, with the names that optimum gives them."""
    if name in TEXT:
        return dict(enumerate(CHOICES if value.dim() == 3 else TEXT[name]))
    return {0: "batch_size"}


def name_axes(graph: Any, axes: list[dict[int, str]]) -> None:
    """Give the sizes that torch.export calls s12 the names of `axes`, one per input."""
    names: dict[str, str] = {}
    for given, named in zip(graph.graph.input, axes, strict=True):
        dims = given.type.tensor_type.shape.dim
        names |= {dims[axis].dim_param: name for axis, name in named.items() if dims[axis].dim_param}
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def quantise(graph: Any, path: Path, large: bool) -> None:
    """Write a model with 8-bit matrices; what comes in is quantised when it runs. Routers stay as they are."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    from .onnx_experts import PREFIX

    add_pre_process_metadata(graph)  # torch.onnx has optimised it
    routers = [node.name for node in graph.graph.node if of_router(node)]
    experts = [node.name for node in graph.graph.node if node.name.startswith(PREFIX)]  # are 8-bit already
    quantize_dynamic(
        graph,
        path,
        op_types_to_quantize=["MatMul", "Gather"],
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[*experts, *routers, *(f"{name}_MatMul" for name in routers)],
        use_external_data_format=large,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what MoE gives, which it cannot know
    )


def of_router(node: Any) -> bool:
    """Whether a node computes part of a router's scores: torch.onnx notes the module that it is from."""
    scope = next((each.value for each in node.metadata_props if each.key == "namespace"), "")
    return any(part.split(":")[0].endswith(".router") for part in scope.split("/"))


def differences(path: Path, batches: list[Batch], outputs: list[Batch]) -> tuple[float, float]:
    """Return the largest and the mean difference between a file and what the model gave, of the batch that is worst.

    They are shares of the largest and of the mean output.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest, mean = [], []
    for batch, expected in zip(batches, outputs, strict=True):
        results = session.run(list(expected), {name: value.numpy() for name, value in batch.items()})
        for result, want in zip(results, expected.values(), strict=True):
            off = (torch.from_numpy(result) - want).abs().nan_to_num(torch.inf)
            largest.append(float(off.max() / want.abs().max().clamp_min(1e-12)))
            mean.append(float(off.mean() / want.abs().mean().clamp_min(1e-12)))
    return max(largest), max(mean)


@contextlib.contextmanager
def masked(model: MoefiedModel) -> Iterator[None]:
    """Let a model run masked for a while, which is what a graph is compared with."""
    from ..runtime.sparse_ffn import sparse_ffn_of

    running = [ffn for site in model.moe_sites() if (ffn := sparse_ffn_of(site)) is not None]
    for ffn in running:
        ffn.remove_()
    try:
        yield
    finally:
        for ffn in running:
            ffn.install_()


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep torch.onnx from warning of packages that no model here needs, and of its own old calls."""
    logger = standard_logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(standard_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
