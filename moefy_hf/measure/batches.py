"""Find what is wrong with a batch of data before a model runs on it."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import MoefyError

LABELS = ("label", "start_positions", "end_positions")  # words in the names of labels


def check_batch(model: PreTrainedModel, batch: Any) -> None:
    """Check that a model can run on a batch.

    Raises:
        MoefyError: no mapping of tensors, a single row, no values, or token ids that the model has no embeddings for.
    """
    if not isinstance(batch, Mapping) or not any(torch.is_tensor(value) for value in batch.values()):
        raise MoefyError(
            "data are an iterable of batches, mappings of tensors that are ready for the model; this one yields a "
            f"{type(batch).__name__}: tokenize and collate rows first, as "
            "DataLoader(rows, batch_size=8, collate_fn=DataCollatorWithPadding(tokenizer)) does"
        )
    ids = batch.get("input_ids")
    if not torch.is_tensor(ids):
        return
    if ids.dim() < 2:
        raise MoefyError(
            f"data are batches, this is a single row: its input_ids have shape {tuple(ids.shape)}, not "
            "(rows, tokens); collate rows into batches, or add a dimension: row.unsqueeze(0)"
        )
    if ids.is_meta:
        raise MoefyError("this batch is on the meta device: it has shapes, and no values")
    known = embeddings_of(model)
    if known is not None and ids.numel() and (largest := int(ids.max())) >= known:
        raise MoefyError(
            f"the tokenizer gave token id {largest}, and the model has embeddings of {known} tokens: use its own "
            "tokenizer, or model.resize_token_embeddings(len(tokenizer)) and save it first"
        )


def unlabelled(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch but those that models compute a loss of."""
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value) and value.dim()}
    return {name: value for name, value in tensors.items() if not any(word in name for word in LABELS)}


def rows_in(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch."""
    return len(next(value for value in batch.values() if torch.is_tensor(value) and value.dim()))


def embeddings_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model has embeddings of; None where it cannot say."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # some models of two modalities
        return None
