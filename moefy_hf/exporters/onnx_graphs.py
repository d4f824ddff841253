"""ONNX graphs of a model, made by torch.onnx, and how they are stored."""

import contextlib
import logging as standard_logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedModel
from ..loading import MoefiedModel
from .onnx_ffn import traced_as_operators
from .onnx_parts import Axes, Part

OPSET = 20  # the first with Gelu
LARGEST_FILE = 1_800_000_000  # bytes of weights: a protobuf file ends at 2 GB


def write_part(model: MoefiedModel, part: Part, folder: Path, int8: bool) -> dict[str, str]:
    """Write one file of a model, and return the operator of each routed FFN.

    Args:
        model: running masked, in evaluation mode.
        part: which file.
        folder: that gets it.
        int8: whether matrices become 8-bit; routers stay in float32.

    Raises:
        UnsupportedModel: torch.onnx cannot write it.
    """
    import onnx

    graph, operators = graph_of(model, part, int8)
    large = sum(len(each.raw_data) for each in graph.graph.initializer) > LARGEST_FILE
    beside: dict[str, Any] = {"save_as_external_data": large, "location": f"{part.file}_data"} if large else {}
    if int8:
        quantise(graph, folder / part.file, large)
    else:
        onnx.save(graph, folder / part.file, **beside)
    return operators


def graph_of(model: MoefiedModel, part: Part, int8: bool) -> tuple[Any, dict[str, str]]:
    """Return the ONNX model of a part, with routed FFNs as operators, and which these are.

    Raises:
        UnsupportedModel: torch.onnx cannot write it.
    """
    from .onnx_experts import split_experts

    example = part.traced
    shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in part.axes[name]} for name in example.inputs)
    with traced_as_operators(model, int8) as operators, quiet_exporter():
        try:
            program = torch.onnx.export(
                part.module.eval(),
                tuple(example.inputs.values()),
                input_names=list(example.inputs),
                output_names=list(example.outputs),
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
    name_axes(graph, part.axes)
    return graph, operators


def name_axes(graph: Any, axes: Axes) -> None:
    """Give the sizes that torch.export calls s12 the names of `axes`."""
    names: dict[str, str] = {}
    for given in graph.graph.input:
        dims = given.type.tensor_type.shape.dim
        names |= {dims[axis].dim_param: name for axis, name in axes[given.name].items() if dims[axis].dim_param}
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        own = axes.get(value.name, {})
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = own.get(axis, names.get(dim.dim_param, dim.dim_param))


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


def session_of(path: Path, threads: int = 0) -> Any:
    """Open a file in ONNX Runtime, on so many threads; 0: a thread per core.

    They sleep between two runs. Those of a model that is not running would slow down the one that is.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def of_router(node: Any) -> bool:
    """Whether a node computes part of a router's scores: torch.onnx notes the module that it is from."""
    scope = next((each.value for each in node.metadata_props if each.key == "namespace"), "")
    return any(part.split(":")[0].endswith(".router") for part in scope.split("/"))


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
