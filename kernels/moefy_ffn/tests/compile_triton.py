"""Compile every kernel for a GPU that need not be here: `python compile_triton.py 90` (for compute capability 9.0).

The interpreter takes more than the compiler does. Shared memory must fit in 96 KiB, which every such GPU has.
"""

import itertools
import sys

from moefy_ffn import triton_kernels as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

INDICES = ("order", "starts", "block_expert", "block_first", "experts")
TENSORS = ("x", "up", "gate", "up_bias", "gate_bias", "hidden", "down", "left", "right", "weight", "bias", "y", "out")
SUMS = {"rows_of_blocks": "out", "rows_of_pairs": "out", "add_pairs": "rows"}  # are float32
UNIT = ("x_column", "up_column", "gate_column", "down_column", "right_column", "weight_column")


def compile_for(target: GPUTarget, kernel: JITFunction, number: str, **constants) -> None:
    """Contiguous rows of `number`, sizes that are multiples of 16."""
    constants |= {name: 1 for name in UNIT if name in kernel.arg_names}
    types = {**dict.fromkeys(INDICES, "*i32"), **dict.fromkeys(TENSORS, number)}
    types |= {SUMS.get(kernel.__name__, ""): "*fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in signature if signature[name] != "constexpr"}
    source = ASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, aligned)
    shared = compile(source, target=target).metadata.shared
    assert shared <= 96 * 1024, f"{kernel.__name__} needs {shared} bytes of shared memory"
    print(kernel.__name__, number, target.arch, shared)


def main(capability: int) -> None:
    target, ungated = GPUTarget("cuda", capability, 32), {"gate": None, "up_bias": None, "gate_bias": None}
    for number, gated in itertools.product(("*bf16", "*fp32"), (False, True)):
        blocks = {"PRECISION": "tf32" if gated else "ieee", "BLOCK_P": 64, "BLOCK_M": 64 if gated else 16}
        blocks |= {"BLOCK_D": 64 if number == "*bf16" else 32}
        act = {"ACTIVATION": "silu"} if gated else {"ACTIVATION": "gelu", **ungated}
        compile_for(target, kernels.neurons_of_blocks, number, **act, **blocks)
        compile_for(target, kernels.rows_of_blocks, number, **blocks)
        compile_for(target, kernels.weights_of_experts, number, **({} if gated else {"bias": None}), **blocks)
        compile_for(target, kernels.neurons_of_pairs, number, **act, BLOCK_M=8, BLOCK_D=256)
    for number in ("*bf16", "*fp32"):
        compile_for(target, kernels.rows_of_pairs, number, BLOCK_M=16, BLOCK_D=128)
        compile_for(target, kernels.add_pairs, number, BLOCK_D=512)


if __name__ == "__main__":
    main(int(sys.argv[1]))
