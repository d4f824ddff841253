"""Every head of popular architectures: converted, saved, and loaded through its Auto class."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import convert, distance, run
from torch import nn

from moefy_hf.discovery.code import _class, heads_of
from moefy_hf.measure.made_up_inputs import made_up_batch

sys.path.insert(0, str(Path(__file__).parents[1] / "registry"))

from tiny_registry import tiny_config  # noqa: E402

POPULAR = (
    "bert roberta camembert mpnet albert modernbert deberta-v2 electra distilbert xlm-roberta esm nomic_bert gpt2 "
    "gpt_neox opt bloom falcon phi3 llama qwen2 qwen3 gemma3 gemma2 smollm3 olmo2 stablelm cohere nemotron arcee t5 "
    "bart m2m_100 whisper wav2vec2 hubert vit dinov2 swin siglip clip qwen2_5_vl llava"
).split()
TOKENS = {"AutoModelForAudioXVector": 64}  # it looks at the spread over time, after five convolutions


def tiny_head(name: str, head: str) -> nn.Module:
    """A tiny model with random weights, norms and biases too."""
    torch.manual_seed(0)
    model = _class(head, name)(tiny_config(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("name", POPULAR)
def test_every_head_is_converted_saved_and_loaded_by_its_auto_class(name, tmp_path):
    heads = heads_of(name)
    assert len(heads) > 0
    for head, auto in heads.items():
        model = tiny_head(name, head)
        batch = made_up_batch(model, tokens=TOKENS.get(auto, 16))
        dense = run(model, batch)
        convert(model, router="similarity" if auto == "AutoModel" else "random")
        full = run(model, batch)
        model.set_selection(k=0.5)
        sparse = run(model, batch)
        scale = max(1.0, *(tensor.abs().max().item() for tensor in dense))
        assert distance(full, dense) < 1e-5 * scale < 1e-4 * scale < distance(sparse, dense), head
        model.save_pretrained(tmp_path / "saved")  # over the head before: its code is the same, and loaded once
        loaded = getattr(transformers, auto).from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
        assert type(loaded).__name__ == f"Moefied{head}" and type(loaded) is not type(model)
        assert distance(run(loaded, batch), sparse) == 0, head
