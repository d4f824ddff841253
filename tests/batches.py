"""Random texts for tiny models: batches of several lengths, padded on the right."""

from typing import Any

import torch
from tiny import VOCAB


def text_batches(
    count: int = 4, rows: int = 4, length: int = 12, seed: int = 0, labels: str | None = None, classes: int = 3
) -> list[dict[str, Any]]:
    """`count` batches of `rows` texts of 1 to `length` tokens.

    labels: "class" (one per text), "causal" (the tokens themselves) or "seq2seq" (another text's tokens); -100 at
    padding.
    """
    generator = torch.Generator().manual_seed(seed)

    def text() -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        return ids * mask, mask

    batches = []
    for _ in range(count):
        ids, mask = text()
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if labels == "class":
            batch["labels"] = torch.randint(0, classes, (rows,), generator=generator)
        elif labels == "causal":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        elif labels == "seq2seq":
            target, target_mask = text()
            batch["labels"] = target.masked_fill(target_mask == 0, -100)
        batches.append(batch)
    return batches


def real_count(batches: list[dict[str, Any]]) -> int:
    """Tokens that are no padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)
