"""Backend "cpu": the C++ kernel, which routes by itself where the router is one or two matrices."""

from typing import Any

import torch
from moefy_ffn import BuildError, MoeFfn, build
from moefy_ffn.build import library

from ..modeling.routers import router_facts
from ..modeling.selection import kernel_name_of, threshold_of
from .backend_base import Backend, expert_means


class CpuKernel(Backend):
    """The C++ kernel: `prepare` makes a `MoeFfn` on the FFN's own weights, which decoding calls again and again."""

    name = "cpu"

    @classmethod
    def require(cls) -> None:
        library()

    @classmethod
    def unavailable(cls) -> str | None:
        try:
            build.compiled()
        except (BuildError, OSError) as error:
            return str(error)
        return None

    @classmethod
    def largest_share(cls, x: torch.Tensor, expert_size: int) -> float:
        """Return the share of the experts above which dense is as fast, for tokens x (..., d).

        Measured with one thread of a Zen 5 (AVX-512, AVX512_BF16), times F.linear, the router left out: one token,
        which is bound by memory, 1.7 to 2.3 at a share of 0.95, experts as small as single neurons; 2 to 16 tokens at
        0.8 and experts of 8 or more 1.1 to 2.3; 128 tokens at 0.5 and experts of 32 3.0 in float32, 1.2 in bfloat16
        (of a Zen 4 1.6 and 1.1, with AVX2 alone less). Rows of fine experts are multiplied by few tokens at a time: at
        0.8, 16 tokens, experts of 4 and 1 neurons come to 1.4 and 0.6 in float32, 0.8 and 0.3 in bfloat16; at 0.3,
        128 tokens, to 2.8 and 1.06, 0.7 and 0.26; at 0.2, single neurons to 1.7 in float32. Where a processor has AMX,
        dense bfloat16 runs on it and the kernel does not: many tokens are left to dense there.
        """
        tokens, narrow = x.numel() // x.shape[-1], x.dtype == torch.bfloat16
        if tokens <= 1:
            return 1.0
        if tokens <= 16:
            return 0.8 * min(1.0, expert_size / (8 if narrow else 2))
        on_amx = narrow and torch.cpu._is_amx_tile_supported()
        return 0.0 if on_amx else 0.5 * min(1.0, expert_size / (16 if narrow else 2))

    def compute(self, x: torch.Tensor, most: float | None) -> torch.Tensor | None:
        kernel: MoeFfn = self.prepared()
        if kernel.routed:
            # How many experts these tokens need is known only when they are routed: an average that was measured on
            # others would be no promise. The kernel counts them before any runs, and stops at too many
            return kernel(x)[0] if most is None else kernel.within(x, most)
        expert_mask = self.act.keep(x)  # (..., E)
        if most is not None and float(expert_mask.float().mean()) > most:
            return None
        return kernel(x, torch.arange(expert_mask.shape[-1], dtype=torch.int32).where(expert_mask, -1))[0]

    def state(self) -> tuple:
        act = self.act
        pointers = []
        for linear in self.linears:
            pointers.append(linear.weight.data_ptr())
            if (bias := linear.bias) is not None:
                pointers.append(bias.data_ptr())
        for matrix in self.router_matrices():
            pointers += (matrix.data_ptr(), matrix.shape)
        if act.compensation is None:
            return act.selection, type(act.router), *pointers
        # means are products of these tensors, which may change in place
        products = [each for each in (act.compensation, self.linears[-1].weight) if not each.is_inference()]
        versions = [each._version for each in products]
        return act.selection, type(act.router), *pointers, act.compensation.data_ptr(), *versions

    def prepare(self) -> MoeFfn:
        site, act, weights = self.site, self.act, self.site.weights()
        return MoeFfn(
            weights.up,
            weights.down.t(),
            expert_size=act.expert_size,
            activation=self.activation,
            shared=act.shared,
            gate=weights.gate,
            up_bias=weights.up_bias,
            gate_bias=weights.gate_bias,
            down_bias=site.down.bias,
            means=None if act.compensation is None else expert_means(site),
            **self.routing(),
        )

    def router_matrices(self) -> list[torch.Tensor]:
        """Return the one or two matrices by which the kernel routes by itself; none where the router scores in torch.

        It does so where scores are no product of matrices, where hooks want to see them, as those do that count
        experts, and where the kernel does not know the selection.
        """
        router, selection = self.act.router, self.act.selection
        names = router_facts(router).kernel_weights
        if not names or router._forward_hooks or router._forward_pre_hooks or not kernel_name_of(selection):
            return []
        matrices = [router._parameters.get(name) for name in names]  # older code may have other names
        if any(matrix is None or not matrix.is_contiguous() for matrix in matrices):
            return []
        dtypes = {matrix.dtype for matrix in matrices}
        return matrices if dtypes in ({torch.float32}, {self.linears[0].weight.dtype}) else []

    def routing(self) -> dict[str, Any]:
        """Return the arguments by which the kernel routes; none where it is told which experts run."""
        act, selection, matrices = self.act, self.act.selection, self.router_matrices()
        if not matrices:
            return {}
        routing = {"router": matrices[-1], "selection": kernel_name_of(selection)}
        if len(matrices) == 2:
            routing["router_in"] = matrices[0]
        if not selection.dynamic:
            return routing | {"k": act.k}
        return routing | {"setting": threshold_of(selection), "strengths": router_facts(act.router).kernel_strengths}
