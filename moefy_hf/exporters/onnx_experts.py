"""Experts as products of their own: the tokens of each expert are gathered, computed by themselves, and added.

They are added one expert after the other. ONNX Runtime's ScatterND adds rows in several threads, and loses some where
a token has more than one.

This is exact for every selection and activation. No product is made for experts that a token does not run. In float32
all operators are standard ones. In 8 bits, products are ONNX Runtime's: tokens are quantised once for all experts,
neurons once more for `down`, and matrices have a scale per neuron or output.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .onnx_ffn import SPLIT

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
LARGEST = 63  # of a matrix in 8 bits: processors without VNNI add two products in 16 bits, which 127 overflows
PREFIX = "moefy_experts"  # of the names of these nodes


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

    def rows(self, x: str, tokens: list[str]) -> list[str]:
        """Add the rows of x (T, d) for each expert, of whose tokens these are the numbers."""
        return [self("Gather", x, each, axis=0) for each in tokens]


class Int8Nodes(Nodes):
    """Nodes whose matrices are 8-bit."""

    def __init__(self, prefix: str):
        super().__init__(prefix)
        self.quantised: dict[str, list[str]] = {}  # rows in 8 bits -> the names of their scale and zero point

    def linear(self, x: str, rows: np.ndarray, bias: np.ndarray | None) -> str:
        numbers, scale = self.hold_int8(rows)
        added = "" if bias is None else self.hold(bias)
        if x in self.quantised:
            its_scale, zero = self.quantised[x]
            inputs = (x, numbers, its_scale, scale, zero, "", added)
            return self("MatMulIntegerToFloat", *inputs, domain=MICROSOFT)
        return self("DynamicQuantizeMatMul", x, numbers, scale, "", added, domain=MICROSOFT)

    def rows(self, x: str, tokens: list[str]) -> list[str]:
        x, *how = self("DynamicQuantizeLinear", x, results=3)
        found = super().rows(x, tokens)
        self.quantised = dict.fromkeys(found, how)
        return found

    def hold_int8(self, rows: np.ndarray) -> tuple[str, str]:
        """Add rows.T in 8 bits, and a scale per column; return their names."""
        scale = np.maximum(np.abs(rows).max(1), 1e-30) / LARGEST
        numbers = np.round(rows / scale[:, None]).astype(np.int8)
        return self.hold(numbers.T), self.hold(scale.astype(np.float32))


def split_experts(model: onnx.ModelProto) -> None:
    """Replace every `SPLIT` operator of a model, in place."""
    domain = SPLIT.partition("::")[0]
    graph = model.graph
    held = {each.name: each for each in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    taken: set[str] = set()  # names of what experts were cut from
    for node in graph.node:
        if node.domain != domain:
            nodes.append(node)
            continue
        taken |= set(node.input[2:])
        split = experts_of(node, [numpy_helper.to_array(held[name]) if name else None for name in node.input[2:]])
        nodes += split.nodes
        graph.initializer.extend(split.held)
    replace_all(graph.node, nodes)
    used = {name for node in nodes for name in node.input} | {each.name for each in graph.output}
    replace_all(graph.initializer, [each for each in graph.initializer if each.name in used or each.name not in taken])
    imported = {each.domain: each.version for each in model.opset_import if each.domain != domain} | {MICROSOFT: 1}
    replace_all(model.opset_import, [helper.make_opsetid(*each) for each in imported.items()])


def experts_of(node: onnx.NodeProto, matrices: list[np.ndarray | None]) -> Nodes:
    """Return what computes a `SPLIT` node.

    Args:
        node: its inputs are tokens (T, d) and which experts each runs (T, E), then matrices.
        matrices: up (E, m, d) and its bias (E, m), gate and its bias, and down (E, m, d); None where there is none.
    """
    x, mask = node.input[:2]
    up, up_bias, gate, gate_bias, down = matrices
    assert up is not None and down is not None
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    function = attributes["function"].decode()
    add = (Int8Nodes if attributes["int8"] else Nodes)(f"{PREFIX}_{node.name}")
    by_expert = add("Transpose", mask, perm=[1, 0])  # (E, T)
    pairs = add("NonZero", by_expert)  # (2, P): experts in order, and for each its tokens
    every = add("Gather", pairs, add.hold(np.int64(1)), axis=0)
    counts = add("ReduceSum", add("Cast", by_expert, to=onnx.TensorProto.INT64), add.hold(np.array([1])), keepdims=0)
    split = add("Split", every, counts, axis=0, results=len(up))
    tokens = [split] if len(up) == 1 else split
    sum_ = add("Expand", add.hold(np.float32(0)), add("Shape", x))
    for expert, rows in enumerate(add.rows(x, tokens)):
        neurons = add.linear(rows, up[expert], None if up_bias is None else up_bias[expert])
        if gate is None:
            neurons = add.function(function, neurons)
        else:
            open_ = add.linear(rows, gate[expert], None if gate_bias is None else gate_bias[expert])
            neurons = add("Mul", add.function(function, open_), neurons)
        output = add.linear(neurons, down[expert].T, None)
        places = add("Unsqueeze", tokens[expert], add.hold(np.array([1])))
        last = node.output[0] if expert == len(up) - 1 else None
        sum_ = add("ScatterND", sum_, places, output, reduction="add", out=last)
    return add


def replace_all(field: Any, values: Iterable[Any]) -> None:
    """Let a repeated field of a protobuf message have these values."""
    values = list(values)
    del field[:]
    field.extend(values)
