"""Every head of popular architectures: converted, saved, and loaded through its Auto class."""

import pytest
import torch
import transformers
from registry.tiny_registry import tiny_config, tiny_model
from tiny import convert
from torch import nn

from moefy_hf.discovery.code import heads_of
from moefy_hf.errors import UnsupportedModel
from moefy_hf.measure.made_up_inputs import made_up_batch

POPULAR = (
    "bert roberta camembert mpnet albert modernbert deberta-v2 electra distilbert xlm-roberta esm nomic_bert gpt2 "
    "gpt_neox opt bloom falcon phi3 llama qwen2 qwen3 gemma3 gemma2 smollm3 olmo2 stablelm cohere nemotron arcee t5 "
    "bart m2m_100 whisper wav2vec2 hubert vit dinov2 swin siglip clip qwen2_5_vl llava"
).split()
HEADS = [(name, head, auto) for name in POPULAR for head, auto in heads_of(name).items()]


def tiny_head(name: str, head: str) -> nn.Module:
    ...
