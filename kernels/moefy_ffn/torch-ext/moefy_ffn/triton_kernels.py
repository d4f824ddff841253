"""The routed FFN on GPUs: a token's row times its experts' neurons, and back, for pairs (token, expert).

Expert e is the rows [e*m, (e+1)*m) of a matrix (f, d) of any strides. T tokens of K slots make T * K pairs; pair p is
slot p % K of token p // K. Two forms: blocks of pairs that share an expert, for matrix units (`group` in
`triton_ffn.py` makes them); and one pair per program, for a few tokens, which are bound by the memory that the rows
come from. Every sum has one fixed order: the same bits on every run.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def activate(a, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        a = tl.where(a < 0, 0.0, a)  # nan stays nan
    elif ACTIVATION == "relu_squared":
        a = tl.where(a < 0, 0.0, a * a)
    elif ACTIVATION == "gelu":
        a = 0.5 * a * (1 + tl.erf(a * 0.70710678118654752))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        a = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    elif ACTIVATION == "silu":
        a = a * tl.sigmoid(a)
    elif ACTIVATION == "quick_gelu":
        a = a * tl.sigmoid(1.702 * a)
    return a


@triton.jit
def finish(a, g, up_bias, gate_bias, neurons, inside, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Biases, activation, gate; a and g float32, neurons along the last dimension."""
    if up_bias is not None:
        a += tl.load(up_bias + neurons, mask=inside, other=0).to(tl.float32)
    if GATED:
        if gate_bias is not None:
            g += tl.load(gate_bias + neurons, mask=inside, other=0).to(tl.float32)
        a = activate(g, ACTIVATION) * a
    else:
        a = activate(a, ACTIVATION)
    return a


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def pairs_of(order, starts, block_expert, block_first, BLOCK_P: tl.constexpr):
    """(expert, or -1 where the block is surplus; pairs; which of them are)"""
    expert = tl.load(block_expert + tl.program_id(0))
    rows = tl.load(block_first + tl.program_id(0)) + tl.arange(0, BLOCK_P)
    used = rows < tl.load(starts + expert + 1, mask=expert >= 0, other=0)
    return expert, tl.load(order + rows, mask=used, other=0), used


@triton.jit
def neurons_of_blocks(
    x, up, gate, up_bias, gate_bias, out, order, starts, block_expert, block_first, d, m, slots,
    x_token, x_column, up_row, up_column, gate_row, gate_column,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x (T, d) -> out (T * K, m) = act(gate x) * up x, or act(up x). Grid: blocks of pairs, blocks of m."""
    expert, pairs, used = pairs_of(order, starts, block_expert, block_first, BLOCK_P)
    if expert < 0:
        return
    own = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    neurons, inside = expert.to(tl.int64) * m + own, own < m
    tokens = (pairs // slots).to(tl.int64)
    a = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    g = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        there = columns < d
        places = tokens[:, None] * x_token + columns[None, :] * x_column
        rows = tl.load(x + places, mask=used[:, None] & there[None, :], other=0)  # (P, D)
        mask = there[:, None] & inside[None, :]
        weight = tl.load(up + neurons[None, :] * up_row + columns[:, None] * up_column, mask=mask, other=0)  # (D, M)
        a = multiply(rows, weight, a, PRECISION)
        if gate is not None:
            weight = tl.load(gate + neurons[None, :] * gate_row + columns[:, None] * gate_column, mask=mask, other=0)
            g = multiply(rows, weight, g, PRECISION)
    a = finish(a, g, up_bias, gate_bias, neurons, inside, ACTIVATION, gate is not None)
    places = pairs.to(tl.int64)[:, None] * m + own[None, :]
    tl.store(out + places, a.to(out.dtype.element_ty), mask=used[:, None] & inside[None, :])


@triton.jit
def rows_of_blocks(
    hidden, down, out, order, starts, block_expert, block_first, first_column, width, m,
    down_row, down_column, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden (T * K, m) -> out (T * K, width) float32: hidden times the expert's rows of down, in the columns from
    first_column on. Grid: blocks of pairs, blocks of width."""
    expert, pairs, used = pairs_of(order, starts, block_expert, block_first, BLOCK_P)
    if expert < 0:
        return
    own = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns, there, pairs = first_column + own, own < width, pairs.to(tl.int64)
    y = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, m, BLOCK_M):
        neurons = start + tl.arange(0, BLOCK_M)
        inside = neurons < m
        h = tl.load(hidden + pairs[:, None] * m + neurons[None, :], mask=used[:, None] & inside[None, :], other=0)
        rows = expert.to(tl.int64) * m + neurons
        places = rows[:, None] * down_row + columns[None, :] * down_column
        y = multiply(h, tl.load(down + places, mask=inside[:, None] & there[None, :], other=0), y, PRECISION)
    tl.store(out + pairs[:, None] * width + own[None, :], y, mask=used[:, None] & there[None, :])


@triton.jit
def neurons_of_pairs(
    x, up, gate, up_bias, gate_bias, out, experts, d, m, slots,
    x_token, x_column, up_row, up_column, gate_row, gate_column,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`neurons_of_blocks`, a pair at a time. Grid: pairs, blocks of m."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts + pair).to(tl.int64)
    if expert < 0:
        return
    own = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    neurons, inside = expert * m + own, own < m
    a = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # added up over columns once, at the end
    g = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        there = columns < d
        row = tl.load(x + pair // slots * x_token + columns * x_column, mask=there, other=0).to(tl.float32)
        mask = inside[:, None] & there[None, :]
        weight = tl.load(up + neurons[:, None] * up_row + columns[None, :] * up_column, mask=mask, other=0)
        a += weight.to(tl.float32) * row[None, :]
        if gate is not None:
            weight = tl.load(gate + neurons[:, None] * gate_row + columns[None, :] * gate_column, mask=mask, other=0)
            g += weight.to(tl.float32) * row[None, :]
    h = finish(tl.sum(a, 1), tl.sum(g, 1), up_bias, gate_bias, neurons, inside, ACTIVATION, gate is not None)
    tl.store(out + pair * m + own, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rows_of_pairs(
    hidden, down, out, experts, first_column, width, m, down_row, down_column,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`rows_of_blocks`, a pair at a time. Grid: pairs, blocks of width."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts + pair).to(tl.int64)
    if expert < 0:
        return
    own = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns, there = first_column + own, own < width
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, m, BLOCK_M):
        neurons = start + tl.arange(0, BLOCK_M)
        inside = neurons < m
        h = tl.load(hidden + pair * m + neurons, mask=inside, other=0).to(tl.float32)
        places = (expert * m + neurons)[:, None] * down_row + columns[None, :] * down_column
        rows = tl.load(down + places, mask=inside[:, None] & there[None, :], other=0)
        y += h[:, None] * rows.to(tl.float32)
    tl.store(out + pair * width + own, tl.sum(y, 0), mask=there)


@triton.jit
def add_pairs(rows, bias, experts, y, first_column, width, d, slots, BLOCK_D: tl.constexpr):
    """rows (T * K, width) -> y (T, d), in the columns from first_column on: bias plus the rows of a token's used
    slots, in their order. Grid: tokens, blocks of width."""
    token = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns, there = first_column + own, own < width
    total = tl.zeros((BLOCK_D,), tl.float32)
    for slot in range(0, slots):
        pair = token * slots + slot
        if tl.load(experts + pair) >= 0:  # rows of unused slots were never written
            total += tl.load(rows + pair * width + own, mask=there, other=0)
    if bias is not None:
        total += tl.load(bias + columns, mask=there, other=0).to(tl.float32)
    tl.store(y + token * d + columns, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def weights_of_experts(
    left, right, weight, bias, order, starts, d, m, slots,
    right_token, right_column, weight_row, weight_column, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """left (T * K, m), right (T, d) -> weight (f, d), an expert's rows being left^T right summed over its pairs, and
    bias (f), left alone so summed: gradients of a matrix and its bias. Grid: experts, blocks of m, blocks of d."""
    expert = tl.program_id(0)
    own = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside, there = own < m, columns < d
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    alone = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.load(starts + expert + 1)
    for start in range(tl.load(starts + expert), last, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        used = rows < last
        pairs = tl.load(order + rows, mask=used, other=0).to(tl.int64)
        a = tl.load(left + pairs[None, :] * m + own[:, None], mask=inside[:, None] & used[None, :], other=0)  # (M, P)
        places = (pairs // slots)[:, None] * right_token + columns[None, :] * right_column
        b = tl.load(right + places, mask=used[:, None] & there[None, :], other=0)  # (P, D)
        total = multiply(a, b, total, PRECISION)
        alone += tl.sum(a.to(tl.float32), 1)
    neurons = expert.to(tl.int64) * m + own
    places = neurons[:, None] * weight_row + columns[None, :] * weight_column
    tl.store(weight + places, total.to(weight.dtype.element_ty), mask=inside[:, None] & there[None, :])
    if bias is not None:
        if tl.program_id(2) == 0:
            tl.store(bias + neurons, alone.to(bias.dtype.element_ty), mask=inside)
