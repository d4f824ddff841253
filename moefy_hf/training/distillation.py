"""Distillation: a model in training stays close to what a frozen teacher, usually its dense self, does."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..measure.metrics import counted
from ..modeling.ffn_sites import find_sites
from .losses import ExtraLossCallback


class DistillationCallback(ExtraLossCallback):
    """Adds `weight` times (KL of the teacher's predictions + `ffn_weight` * error of the FFNs' outputs) to the loss.

    The divergence KL(teacher || student) of the distributions softened by `temperature`, times its square so that the
    gradients keep their size (Hinton et al., 2015), is a mean over the positions that count: rows, or tokens with a
    label. The error of an FFN's output is its squared distance to the teacher's relative to that one's squared norm,
    a mean over FFNs.

    Args:
        teacher: a model with the same head; frozen, and moved to the device of the training.

    Raises:
        ValueError: a negative weight or temperature; in training, another head or, where FFNs are compared, another
            number of FFNs.
    """

    name = "distillation"

    def __init__(
        self, teacher: PreTrainedModel, weight: float = 1.0, temperature: float = 2.0, ffn_weight: float = 0.0
    ):
        super().__init__(weight)
        if not (temperature > 0 and ffn_weight >= 0):
            raise ValueError(f"temperature must be positive and ffn_weight not negative: {temperature}, {ffn_weight}")
        self.teacher, self.temperature, self.ffn_weight = teacher, temperature, ffn_weight
        self.ours: list[torch.Tensor] = []
        self.theirs: list[torch.Tensor] = []
        self.autocast: Any = contextlib.nullcontext

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.teacher.to(args.device).eval().requires_grad_(False)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
        self.autocast = lambda: torch.autocast(args.device.type, dtype, enabled=dtype is not None)
        super().on_train_begin(args, state, control, model, **kwargs)

    def watch(self, model: PreTrainedModel) -> list:
        if not self.ffn_weight:
            return []
        sites = find_sites(model), find_sites(self.teacher)
        if len(sites[0]) != len(sites[1]):
            raise ValueError(f"the teacher has {len(sites[1])} FFNs, the model {len(sites[0])}: set ffn_weight to 0")
        return [
            site.down.register_forward_hook(lambda _, args, y, seen=seen: self.see(seen, y))
            for seen, each in zip((self.ours, self.theirs), sites, strict=True)
            for site in each
        ]

    def see(self, seen: list[torch.Tensor], output: torch.Tensor) -> None:
        if self.running or seen is self.theirs:
            seen.append(output)

    def begin(self) -> None:
        self.ours.clear()
        self.theirs.clear()

    def value(self, model: PreTrainedModel, output: Any) -> torch.Tensor | None:
        batch = {key: value for key, value in self.batch.items() if key != "num_items_in_batch"}
        with torch.no_grad(), self.autocast():
            expected = self.teacher(**batch)
        student, teacher = counted(model, output, batch)[0], counted(self.teacher, expected, batch)[0]
        if student.shape != teacher.shape:
            raise ValueError(
                f"the teacher predicts {tuple(teacher.shape)}, the model {tuple(student.shape)}: heads differ"
            )
        log_p, log_q = ((logits.float() / self.temperature).log_softmax(-1) for logits in (teacher, student))
        found = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * self.temperature**2
        if self.ffn_weight:
            errors = [
                (y.float() - t.float()).square().sum() / t.float().square().sum().clamp_min(1e-12)
                for y, t in zip(self.ours, self.theirs, strict=True)
            ]
            found = found + self.ffn_weight * torch.stack(errors).mean()
        return found
