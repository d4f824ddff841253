"""Which of the tokens that an FFN sees are text, and which are padding."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..discovery.towers import KINDS, tower_of
from ..modeling.ffn_sites import FfnSite


def real_tokens(model: PreTrainedModel, site: FfnSite, batch: Mapping[str, Any], tokens: int) -> torch.Tensor | None:
    """Return (tokens,) bool, true where a token is no padding; None where nothing is padded.

    The mask is one of texts. It is ignored in towers that read images or sound, and where its length is another.

    Args:
        batch: what the model runs on.
        tokens: how many tokens the FFN sees of it.
    """
    mask = batch.get("attention_mask")
    if model.config.is_encoder_decoder and "decoder" in site.name.split("."):
        mask = batch.get("decoder_attention_mask")
        if mask is None and batch.get("labels") is not None:
            mask = batch["labels"] != -100
    if mask is None or mask.numel() != tokens or tower_of(model, site.name) in KINDS.values():
        return None
    return mask.reshape(-1).bool().to(site.down.weight.device)  # models may lie on several devices


def without_padding(
    model: PreTrainedModel, site: FfnSite, batch: Mapping[str, Any], rows: torch.Tensor
) -> torch.Tensor:
    """Return the rows of real tokens: (..., n) of all tokens that an FFN sees of a batch -> (T, n)."""
    rows = rows.reshape(-1, rows.shape[-1])
    real = real_tokens(model, site, batch, len(rows))
    return rows if real is None else rows[real.to(rows.device)]
