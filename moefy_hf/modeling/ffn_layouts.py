"""Where each architecture keeps its FFNs: the names of their parts. An architecture is one line of `SPECS`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FfnSpec:
    """Names below the module that holds an FFN; any module that has them all is a site.

    `gate` names the gate projection of a gated FFN (SwiGLU, GEGLU). `parts=2` says that `up` is one fused matrix: gate
    rows first, then up rows.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    parts: int = 1


FC = FfnSpec("fc1", "fc2", "activation_fn")
BERT = FfnSpec("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
C_FC = FfnSpec("c_fc", "c_proj", "act")
H_TO_4H = FfnSpec("dense_h_to_4h", "dense_4h_to_h", "act")
GATED = FfnSpec("up_proj", "down_proj", "act_fn", gate="gate_proj")
T5 = (FfnSpec("wi", "wo", "act"), FfnSpec("wi_1", "wo", "act", gate="wi_0"))

# model_type -> the layouts its FFNs may have
SPECS: dict[str, tuple[FfnSpec, ...]] = {
    **dict.fromkeys(["t5", "mt5", "umt5"], T5),
    **dict.fromkeys(["opt", "bart", "mbart", "pegasus", "marian", "whisper", "vit", "clip"], (FC,)),
    "phi": (FC,),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2"], (BERT,)),
    "distilbert": (FfnSpec("lin1", "lin2", "activation"),),
    **dict.fromkeys(["gpt2", "gpt_neo", "starcoder2"], (C_FC,)),
    **dict.fromkeys(["gpt_neox", "falcon"], (H_TO_4H,)),
    "gptj": (FfnSpec("fc_in", "fc_out", "act"),),
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite"], (GATED,)
    ),
    "phi3": (FfnSpec("gate_up_proj", "down_proj", "activation_fn", parts=2),),
    "modernbert": (FfnSpec("Wi", "Wo", "act", parts=2),),
}
