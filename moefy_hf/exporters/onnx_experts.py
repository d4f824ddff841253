"""Experts in standard ONNX operators: the tokens of each expert are gathered, computed by themselves, and summed.

This is exact for every selection and activation. No product is made for experts that a token does not run.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .onnx_ffn import SPLIT


class Nodes:
    """Nodes of a graph that take the place of one operator; all they hold and give is named after it.

    Args:
        prefix: of all names.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []

    def __call__(
        self, operator: str, *inputs: str, results: int = 1, out: str | None = None, **attributes: Any
    ) -> Any:
        """Add a node, and return the name of its result; a list where it gives more than one."""
        name = f"{self.prefix}_{len(self.nodes)}"
        names = [f"{name}_{i}" for i in range(results)] if not out else [out]
        self.nodes.append(helper.make_node(operator, inputs, names, name=f"{name}_{operator}", **attributes))
        return names[0] if len(names) == 1 else names

    def hold(self, value: np.ndarray | np.generic) -> str:
        """Add a constant, and return its name."""
        name = f"{self.prefix}_held_{len(self.held)}"
        self.held.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def function(self, name: str, x: str) -> str:
        """Add an activation, which has transformers' `name`."""
        if name in ("silu", "quick_gelu"):
            inner = x if name == "silu" else self("Mul", x, self.hold(np.float32(1.702)))
            return self("Mul", x, self("Sigmoid", inner))
        if name == "relu2":
            positive = self("Relu", x)
            return self("Mul", positive, positive)
        if name in ("gelu", "gelu_new"):
            return self("Gelu", x, approximate="none" if name == "gelu" else "tanh")
        return self({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[name], x)

    def linear(self, x: str, rows: np.ndarray, bias: np.ndarray | None) -> str:
        """Add x @ rows.T + bias."""
        product = self("MatMul", x, self.hold(rows.T))
        return product if bias is None else self("Add", product, self.hold(bias))


def split_experts(model: onnx.ModelProto) -> None:
    """Replace every `SPLIT` operator of a model, in place."""
    domain = SPLIT.partition("::")[0]
    graph = model.graph
    held = {each.name: each for each in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.domain != domain:
            nodes.append(node)
            continue
        split = experts_of(node, [numpy_helper.to_array(held[name]) if name else None for name in node.input[2:]])
        nodes += split.nodes
        graph.initializer.extend(split.held)
    replace_all(graph.node, nodes)
    used = {name for node in nodes for name in node.input} | {each.name for each in graph.output}
    replace_all(graph.initializer, [each for each in graph.initializer if each.name in used])
    replace_all(model.opset_import, [each for each in model.opset_import if each.domain != domain])


def experts_of(node: onnx.NodeProto, matrices: list[np.ndarray | None]) -> Nodes:
    """Return what computes a `SPLIT` node.

    Args:
        node: its inputs are tokens (T, d) and which experts each runs (T, E), then matrices.
        matrices: up (E, m, d) and its bias (E, m), gate and its bias, and down (E, m, d); None where there is none.
    """
    x, mask = node.input[:2]
    up, up_bias, gate, gate_bias, down = matrices
    assert up is not None and down is not None
    function = helper.get_attribute_value(node.attribute[0]).decode()
    add = Nodes(node.name)
    by_expert = add("Transpose", mask, perm=[1, 0])  # (E, T)
    pairs = add("NonZero", by_expert)  # (2, P): experts in order, and for each its tokens
    tokens = add("Gather", pairs, add.hold(np.int64(1)), axis=0)
    counts = add("ReduceSum", add("Cast", by_expert, to=onnx.TensorProto.INT64), add.hold(np.array([1])), keepdims=0)
    parts = add("Split", add("Gather", x, tokens, axis=0), counts, axis=0, results=len(up))
    outputs = []
    for expert, rows in enumerate([parts] if len(up) == 1 else parts):
        neurons = add.linear(rows, up[expert], None if up_bias is None else up_bias[expert])
        if gate is None:
            neurons = add.function(function, neurons)
        else:
            open_ = add.linear(rows, gate[expert], None if gate_bias is None else gate_bias[expert])
            neurons = add("Mul", add.function(function, open_), neurons)
        outputs.append(add("MatMul", neurons, add.hold(down[expert])))
    nothing = add("Expand", add.hold(np.float32(0)), add("Shape", x))
    places = add("Unsqueeze", tokens, add.hold(np.array([1])))
    add("ScatterND", nothing, places, add("Concat", *outputs, axis=0), reduction="add", out=node.output[0])
    return add


def replace_all(field: Any, values: Iterable[Any]) -> None:
    """Let a repeated field of a protobuf message have these values."""
    values = list(values)
    del field[:]
    field.extend(values)
