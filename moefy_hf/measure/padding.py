"""Which of the tokens that an FFN sees are text, and which are padding."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..discovery.towers import KINDS, tower_of
from ..modeling.ffn_sites import FfnSite


def real_tokens(model: PreTrainedModel, site: FfnSite, batch: Mapping[str, Any], *sizes: int) -> torch.Tensor | None:
    """Return (tokens,) bool, true where a token is no padding; None where nothing is padded.

    The mask is one of texts. It is ignored in towers that read images or sound, and where its length is another.

    Args:
        batch: what the model runs on.
        sizes: of what the FFN sees: rows and tokens of each; tokens and rows in XLNet; or the number of all tokens.
    """
    mask = batch.get("attention_mask")
    if model.config.is_encoder_decoder and "decoder" in site.name.split("."):
        mask = batch.get("decoder_attention_mask")
        if mask is None and batch.get("labels") is not None:
            mask = batch["labels"] != -100
    if mask is None or mask.numel() != math.prod(sizes) or tower_of(model, site.name) in KINDS.values():
        return None
    if tokens_first(mask.shape, sizes):
        mask = mask.t()
    return mask.reshape(-1).bool().to(site.device)  # models may lie on several devices


def tokens_first(texts: Sequence[int], sizes: Sequence[int]) -> bool:
    """Return whether an FFN sees the tokens of all texts at one place together, as XLNet's and FSMT's do.

    Args:
        texts: (rows, tokens) of the batch.
        sizes: of what the FFN sees.
    """
    return len(texts) == 2 and tuple(sizes) == (texts[1], texts[0]) != tuple(texts)


def without_padding(
    model: PreTrainedModel, site: FfnSite, batch: Mapping[str, Any], rows: torch.Tensor
) -> torch.Tensor:
    """Return the rows of real tokens: (..., n) of all tokens that an FFN sees of a batch -> (T, n)."""
    real = real_tokens(model, site, batch, *rows.shape[:-1])
    rows = rows.reshape(-1, rows.shape[-1])
    return rows if real is None else rows[real.to(rows.device)]
