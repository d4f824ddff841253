"""FFNs in layouts that no table lists, made by hand, and what only looks like one. d = 12, f = 36."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

D, WIDTH = 12, 36


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Plain(nn.Module):
    def __init__(self, act: nn.Module | None = None):
        super().__init__()
        self.widen, self.squash, self.narrow = nn.Linear(D, WIDTH), act or nn.GELU(), nn.Linear(WIDTH, D)

    def forward(self, x):
        return self.narrow(self.squash(self.widen(x)))


class Gated(nn.Module):
    """Names and order tell nothing: the gate is the Linear that comes last."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.b, self.c = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), nn.Linear(D, WIDTH)
        self.twist = nn.SiLU()

    def forward(self, x):
        return self.b(self.gate_proj(x) * self.twist(self.c(x)))


class Fused(nn.Module):
    def __init__(self, up_first: bool):
        super().__init__()
        self.both, self.out, self.act = nn.Linear(D, 2 * WIDTH), nn.Linear(WIDTH, D), nn.ReLU()
        self.up_first = up_first

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.out(a * self.act(b) if self.up_first else self.act(a) * b)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.act, self.c_proj = Conv1D(WIDTH, D), nn.Tanh(), Conv1D(D, WIDTH)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class FunctionAttribute(nn.Module):
    """Keeps a function, as XLM does."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin2, self.act = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), F.gelu

    def forward(self, x):
        return self.lin2(self.act(self.lin1(x)))


class Inline(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), nn.Linear(D, WIDTH)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class NormInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = nn.Linear(D, WIDTH), nn.ReLU(), Norm(WIDTH), nn.Linear(WIDTH, D)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


class WithDropout(nn.Module):
    """Two dropouts; one of them is of the neurons."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, D)
        self.drop_a, self.drop_b = nn.Dropout(0.1), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop_a(self.last(self.drop_b(self.act(self.first(x)))))


class HalfBert(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(D, WIDTH), nn.GELU()

    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x))


class OtherHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(WIDTH, D), nn.LayerNorm(D)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class SelfAttention(nn.Module):
    def __init__(self, q: int = D, o: int = D):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(D, q), nn.Linear(D, q), nn.Linear(D, q), nn.Linear(q, o)

    def forward(self, x):
        return self.o(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x))


class BertLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.intermediate, self.output = SelfAttention(), HalfBert(), OtherHalf()

    def forward(self, x):
        x = x + self.attention(x)
        return self.output(self.intermediate(x), x)


class BartLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.activation_fn, self.activation_dropout = SelfAttention(), nn.ReLU(), 0.1
        self.fc1, self.fc2, self.final_layer_norm = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), nn.LayerNorm(D)

    def forward(self, x):
        h = F.dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training)
        return self.final_layer_norm(x + self.fc2(h))


class Layer(nn.Module):
    """Attention and any number of FFNs."""

    def __init__(self, **ffns: nn.Module):
        super().__init__()
        self.self_attention, self.norm = SelfAttention(), nn.LayerNorm(D)
        for name, ffn in ffns.items():
            self.add_module(name, ffn)

    def forward(self, x):
        x = x + self.self_attention(self.norm(x))
        for name, ffn in self.named_children():
            x = x if name in ("self_attention", "norm") else x + ffn(x)
        return x


class Stack(nn.Module):
    """Layers one after another, as every Transformer has them."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(D, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, D))
