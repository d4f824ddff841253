"""Greedy writing, the same for an encoder-decoder in any engine."""

from abc import ABC, abstractmethod

import torch
from transformers import PreTrainedModel

from .base import Batch


class Writer(ABC):
    """Writes texts token by token, the likeliest each time; nothing else that a generation config may ask for.

    Args:
        model: whose configs say which tokens texts begin and end with.
    """

    def __init__(self, model: PreTrainedModel):
        settings = model.generation_config
        assert settings is not None  # it can generate
        known = [settings.decoder_start_token_id, settings.bos_token_id, settings.pad_token_id]
        self.start = next((token for token in known if token is not None), 0)
        ends = settings.eos_token_id if settings.eos_token_id is not None else []
        self.ends = torch.tensor(ends).flatten()
        self.pad = settings.pad_token_id if settings.pad_token_id is not None else 0

    @abstractmethod
    def encode(self, batch: Batch) -> torch.Tensor:
        """Return the encoder's hidden states (B, L, d)."""

    @abstractmethod
    def begin(self, hidden: torch.Tensor, mask: torch.Tensor) -> None:
        """Begin texts for hidden states (B, L, d) and the mask (B, L) of what is read."""

    @abstractmethod
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Take the last tokens (B, 1); return logits of the next ones (B, V)."""

    def generate(self, batch: Batch, most: int, least: int = 0) -> torch.Tensor:
        """Return tokens (B, 1 + n), the first of which begins every text."""
        ids = torch.full((len(batch["input_ids"]), 1), self.start)
        written, ended = [ids], torch.zeros_like(ids).bool()
        self.begin(self.encode(batch), batch["attention_mask"])
        for place in range(1, most + 1):
            logits = self.step(ids)
            if place <= least:
                logits[:, self.ends.long()] = -torch.inf
            ids = logits.argmax(-1, keepdim=True).masked_fill(ended, self.pad)
            written.append(ids)
            ended |= torch.isin(ids, self.ends)
            if place >= least and ended.all():
                break
        return torch.cat(written, 1)
