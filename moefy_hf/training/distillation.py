"""Distillation: a model in training stays close to what a frozen teacher, usually its dense self, does."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..measure.metrics import counted
from ..modeling.ffn_sites import find_sites
from .losses import ExtraLossCallback


class DistillationCallback(ExtraLossCallback):
    """Adds `weight` times (KL of the teacher's predictions + `ffn_weight` * error of the FFNs' outputs) to the loss.

    The divergence is KL(teacher || student) of the distributions softened by `temperature`. It is multiplied by
    temperature^2, so that gradients keep their size (Hinton et al., 2015, section 2). It is a mean over the positions
    that count: rows, or tokens with a label.

    The error of an FFN's output is its squared distance to the teacher's output, relative to the squared norm of the
    teacher's. It is a mean over FFNs.

    Logs carry `distillation`, the sum before `weight`.

    Args:
        teacher: a model with the same head; it is frozen, and moved to the device of the training.
        weight: factor of all that is added, at least 0.
        temperature: divides the logits, more than 0.
        ffn_weight: factor of the FFNs' error, at least 0; 0 compares predictions alone.

    Raises:
        MoefyError: a negative weight or temperature; in training, another head or, where FFNs are compared, another
            number of FFNs.

    Example:
        >>> callback = DistillationCallback(dense_model, temperature=2.0, ffn_weight=0.1)
        >>> Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
    """

    name = "distillation"

    def __init__(
        self, teacher: PreTrainedModel, weight: float = 1.0, temperature: float = 2.0, ffn_weight: float = 0.0
    ):
        super().__init__(weight)
        if not (temperature > 0 and ffn_weight >= 0):
            raise MoefyError(f"temperature must be positive and ffn_weight not negative: {temperature}, {ffn_weight}")
        self.teacher, self.temperature, self.ffn_weight = teacher, temperature, ffn_weight
        self.student_outputs: list[torch.Tensor] = []  # of the FFNs, in forward order
        self.teacher_outputs: list[torch.Tensor] = []
        self.autocast: Any = contextlib.nullcontext

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.teacher.to(args.device).eval().requires_grad_(False)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
        self.autocast = lambda: torch.autocast(args.device.type, dtype, enabled=dtype is not None)
        super().on_train_begin(args, state, control, model, **kwargs)

    def watch(self, model: PreTrainedModel) -> list:
        """Register a hook on every FFN of both models, where FFNs are compared; return the handles."""
        if not self.ffn_weight:
            return []
        student_sites, teacher_sites = find_sites(model), find_sites(self.teacher)
        if len(student_sites) != len(teacher_sites):
            raise MoefyError(
                f"the teacher has {len(teacher_sites)} FFNs, the model {len(student_sites)}: set ffn_weight to 0"
            )
        return [
            site.down.register_forward_hook(lambda _, args, y, outputs=outputs: self.collect(outputs, y))
            for outputs, sites in ((self.student_outputs, student_sites), (self.teacher_outputs, teacher_sites))
            for site in sites
        ]

    def collect(self, outputs: list[torch.Tensor], output: torch.Tensor) -> None:
        """Add an FFN's output to a list, unless gradient checkpointing computes the student's again."""
        if self.running or outputs is self.teacher_outputs:
            outputs.append(output)

    def begin(self) -> None:
        """Forget the FFN outputs of the batch before."""
        self.student_outputs.clear()
        self.teacher_outputs.clear()

    def value(self, model: PreTrainedModel, output: Any) -> torch.Tensor | None:
        """Return divergence and FFN error of the batch, of shape (); the teacher runs on it here.

        Raises:
            MoefyError: teacher and model predict different shapes.
        """
        batch = {key: value for key, value in self.batch.items() if key != "num_items_in_batch"}
        with torch.no_grad(), self.autocast():
            expected = self.teacher(**batch)
        student, teacher = counted(model, output, batch)[0], counted(self.teacher, expected, batch)[0]
        if student.shape != teacher.shape:
            raise MoefyError(
                f"the teacher predicts {tuple(teacher.shape)}, the model {tuple(student.shape)}: heads differ"
            )
        log_p, log_q = ((logits.float() / self.temperature).log_softmax(-1) for logits in (teacher, student))
        loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * self.temperature**2
        if self.ffn_weight:
            errors = [
                (y.float() - t.float()).square().sum() / t.float().square().sum().clamp_min(1e-12)
                for y, t in zip(self.student_outputs, self.teacher_outputs, strict=True)
            ]
            loss = loss + self.ffn_weight * torch.stack(errors).mean()
        return loss
