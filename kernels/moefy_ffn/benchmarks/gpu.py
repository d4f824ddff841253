"""One FFN on a GPU, dense against Triton's kernels, in turns: `python gpu.py --preset llama-1b --k 0.2`.

Not yet run on a GPU: there are no figures of it. Layers take turns until their weights exceed any cache; outputs are
compared before anything is timed. A ratio above 1 says how many times as fast as dense Triton is; the router and the
choice of experts are part of its time. With --train, forward and backward.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from moefy_ffn.triton_ffn import ACTIVATIONS, triton_moe_ffn
from torch import nn

PRESETS = {  # d, f, activation, gated
    "t5-base": (768, 3072, "relu", False),
    "opt-1.3b": (2048, 8192, "relu", False),
    "llama-1b": (2048, 5632, "silu", True),
}
BYTES = 2**28  # of weights, that no cache holds


class Ffn(nn.Module):
    def __init__(self, d: int, f: int, activation: str, gated: bool, expert_size: int, k: int):
        super().__init__()
        self.activation, self.expert_size, self.k = activation, expert_size, k
        self.up, self.gate = (nn.Parameter(torch.randn(f, d) / d**0.5) if made else None for made in (True, gated))
        self.down = nn.Parameter(torch.randn(f, d) / f**0.5)
        self.router = nn.Parameter(torch.randn(f // expert_size, d), requires_grad=False)

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.detach(), self.router).topk(self.k, sorted=False).indices.int()

    def dense(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        """Of the given experts, if any."""
        act, up = ACTIVATIONS[self.activation], F.linear(x, self.up)
        hidden = act(up) if self.gate is None else act(F.linear(x, self.gate)) * up
        if experts is not None:
            kept = torch.zeros(len(x), len(self.router), device=x.device).scatter(-1, experts.long(), 1)
            hidden = hidden * kept.repeat_interleave(self.expert_size, -1).to(x.dtype)
        return hidden @ self.down

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        settings = {"expert_size": self.expert_size, "activation": self.activation, "gate": self.gate}
        return triton_moe_ffn(x, self.up, self.down, self.choose(x), **settings)


def milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def step(layer: Ffn, name: str, x: torch.Tensor, train: bool) -> None:
    with torch.set_grad_enabled(train):
        y = layer.dense(x) if name == "dense" else layer.sparse(x)
    if train:
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], torch.ones_like(y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="llama-1b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--k", type=float, default=0.2, help="share of the experts")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128, 1024, 8192])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--train", action="store_true")
    given = parser.parse_args()
    d, f, activation, gated = PRESETS[given.preset]
    if f % given.expert_size or not 0 < given.k <= 1:
        parser.error(f"--expert-size {given.expert_size} must divide {f}, and --k {given.k} lie in (0, 1]")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    torch.manual_seed(0)
    dtype, k = getattr(torch, given.dtype), max(1, round(given.k * f / given.expert_size))
    count = BYTES // ((3 if gated else 2) * f * d * dtype.itemsize) + 1
    shape = (d, f, activation, gated, given.expert_size, k)
    layers = [Ffn(*shape).to("cuda", dtype) for _ in range(count)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(given)}, {k} experts, {count} layers")
    for tokens in given.tokens:
        x = torch.randn(tokens, d, device="cuda", dtype=dtype, requires_grad=given.train)
        with torch.no_grad():
            expected = layers[0].dense(x, layers[0].choose(x)).float()
            error = (layers[0].sparse(x).float() - expected).abs().max() / expected.abs().max()
        assert error < 0.03, f"outputs differ by {float(error):.3g} of the largest"
        times: dict[str, list[float]] = {"dense": [], "sparse": []}
        for turn in range(given.rounds + 5):  # the first ones compile
            layer, names = layers[turn % count], list(times)
            random.shuffle(names)
            for name in names:
                times[name].append(milliseconds(partial(step, layer, name, x, given.train)))
        dense, sparse = (statistics.median(times[name][5:]) for name in ("dense", "sparse"))
        print(f"{tokens:6d} tokens: dense {dense:.3f} ms, triton {sparse:.3f} ms, ratio {dense / sparse:.2f}")


if __name__ == "__main__":
    main()
