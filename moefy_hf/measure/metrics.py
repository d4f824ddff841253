"""What a model predicts on a batch, and how good that is: labels, and the dense model's own predictions."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import MoefyError
from ..loading import check_moefied
from ..modeling.moefied import is_moefied
from ..modeling.offload import device_of
from .batches import check_batch

# decoders of encoder-decoder families: as language models of their own they take labels that are shifted already
_SHIFTS: dict[type, bool] = {}  # class of a causal language model -> whether it shifts labels by itself
OVERFLOW = "load the model in float32 or bfloat16 (--dtype), or look for the batch that it overflows on"


class Quality:
    """Running sums of how good predictions are, over the positions that count of all batches.

    Attributes:
        count, labelled: positions, and those of them that have a label.
        loss, correct: sums over labelled positions, of the cross-entropy (nats) and of hits.
        agree, divergence: sums over all, of best guesses that are the dense model's, and of KL(dense || this), nats.
    """

    def __init__(self) -> None:
        self.count = self.labelled = 0
        self.loss = self.correct = self.agree = self.divergence = 0.0

    def __add__(self, other: "Quality") -> "Quality":
        """Return the sums over the positions of both."""
        both = Quality()
        for name, value in vars(self).items():
            setattr(both, name, value + getattr(other, name))
        return both

    def update_(self, logits: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Add the positions of one batch. One where logits overflowed neither agrees nor is correct.

        Args:
            logits, dense: (N, C), this model's and the dense model's.
            labels: (N,), if there are any.

        Raises:
            MoefyError: the dense model's overflowed: there is nothing to compare with.
        """
        logits, dense = logits.float(), dense.float()
        if not usable(dense).all():
            raise MoefyError(f"the dense model's predictions are not finite: {OVERFLOW}")
        best = logits.argmax(-1).masked_fill(~usable(logits), -1)  # (N,)
        self.count += len(logits)
        self.agree += float((best == dense.argmax(-1)).sum())
        reference = dense.log_softmax(-1)
        self.divergence += float(F.kl_div(logits.log_softmax(-1), reference, log_target=True, reduction="sum"))
        if labels is not None:
            self.labelled += len(labels)
            self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            self.correct += float((best == labels).sum())

    def figures(self) -> dict[str, float]:
        """Return means over the positions: `agreement` and `kl`; and with labels `accuracy`, `loss`, `perplexity`."""
        means = {"agreement": self.agree / self.count, "kl": self.divergence / self.count}
        if self.labelled:
            loss = self.loss / self.labelled
            means |= {
                "accuracy": self.correct / self.labelled,
                "loss": loss,
                "perplexity": float(torch.tensor(loss).exp()),
            }
        return means


def usable(logits: torch.Tensor) -> torch.Tensor:
    """Return (N,) bool, true where logits (N, C) have no nan and no inf; -inf is how models rule a class out."""
    return ~(logits.isnan() | logits.isposinf()).any(-1)


def predictions(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run one batch, and return what `counted` does of its output.

    Raises:
        MoefyError: as `check_batch` and `counted`.
    """
    check_batch(model, batch)
    device = device_of(model)
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    output = model(**batch)
    return counted(model, output, batch)


def counted(model: PreTrainedModel, output: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the logits (N, C) of a model's output at the positions that count, and their labels (N,) or None.

    Positions count that have a label; without labels, those that are no padding.

    Raises:
        MoefyError: the model returns no logits, or predicts anything but one of several classes.
    """
    if hasattr(output, "start_logits"):  # question answering: two choices among the tokens
        labels = None
        if batch.get("start_positions") is not None:
            labels = torch.cat([batch["start_positions"], batch["end_positions"]])
        return torch.cat([output.start_logits, output.end_logits]), labels
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    if logits is None:
        raise MoefyError(
            f"{type(model).__name__} returns no logits to compare; evaluate a model with one prediction head"
        )
    if logits.dim() == 2:
        _check_classes(model, logits, labels)
        return logits, labels
    if labels is None:
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == logits.shape[:2]:
            return logits[mask.bool()], None
        return logits.flatten(0, 1), None
    if is_causal(model) and shifts_labels(model, output, labels):
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != -100
    return logits[counts], labels[counts]


@torch.no_grad()
def shifts_labels(model: PreTrainedModel, output: Any, labels: torch.Tensor) -> bool:
    """Return whether a model's labels are the inputs, so that each position is compared with the next label.

    Decoders of BART's kind take labels that are shifted already. Which of them a model is, its loss says.

    Args:
        model: a causal language model.
        output: what it returned, with `logits` (B, T, C).
        labels: (B, T), which it was given.
    """
    if type(model) not in _SHIFTS:
        logits, loss = output.logits.float(), getattr(output, "loss", None)
        if loss is None or labels.shape != logits.shape[:2]:
            return True
        shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        aligned = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if not (abs(shifted - aligned) > 1e-3 * abs(aligned)):  # they say nothing, or are not finite
            return True
        _SHIFTS[type(model)] = bool(abs(shifted - loss) <= abs(aligned - loss))
    return _SHIFTS[type(model)]


def _check_classes(model: PreTrainedModel, logits: torch.Tensor, labels: torch.Tensor | None) -> None:
    """Raise a ValueError where there is no one class per row: for numbers (regression), or several labels at once."""
    problem = getattr(model.config, "problem_type", None)
    several = problem in ("regression", "multi_label_classification") or logits.shape[-1] == 1
    if several or (labels is not None and (labels.is_floating_point() or labels.shape != logits.shape[:1])):
        shape = "no labels" if labels is None else f"{labels.dtype} labels of shape {tuple(labels.shape)}"
        raise MoefyError(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)}, there are {shape}, and its "
            f"problem_type is {problem}: only predictions of one of several classes can be compared, not regression "
            "or multi-label ones"
        )


def unwrapped(model: Any) -> Any:
    """Return the transformers model below an adapter; a model without one is returned as it is."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapted(model: Any) -> bool:
    """Return whether peft has put adapters around a model; by name, for importing peft takes seconds."""
    return any(base.__name__ == "PeftModel" for base in type(model).__mro__)


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether this is a language model, which predicts each token from those before it."""
    model = unwrapped(model)
    stock = check_moefied(model).stock_class() if is_moefied(model) else type(model)
    generates = stock.can_generate() and not model.config.is_encoder_decoder  # also those that look at images
    return generates or stock.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
