"""What could be done where no conversion is worth it."""

import copy

from transformers import PreTrainedModel

from ..bench.engines import ENGINES
from ..bench.engines.base import ENCODER_DECODER, LANGUAGE_MODEL, kind_of
from ..config import MoEficationConfig
from ..conversion.convert import moefy_
from ..loading import check_moefied
from .candidates import RELU, activation_of, converted_sites
from .clock import Clock

UNFITTED = MoEficationConfig(splitter="random", router="random", allocation="uniform", num_experts=1)
TASKS = {  # end of a class' name -> the task of `moefy train`
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForImageClassification": "image_classification",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}


def advice_of(model: PreTrainedModel, clock: Clock, config: MoEficationConfig) -> list[str]:
    """Return what could be done instead of a conversion, a line each.

    Args:
        model: the dense one.
        clock: that timed what became of it.
        config: which of its FFNs were converted.
    """
    found = [training_line(model, activation_of(converted_sites(model, config)) == RELU)]
    return found + eight_bits(model, clock)


def training_line(model: PreTrainedModel, relu: bool) -> str:
    """Return what training could do."""
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    if kind_of(model) == ENCODER_DECODER:
        task = "seq2seq"
    name = model.name_or_path or "MODEL"
    if task is None:
        return "fine-tune it for a task with ReLU and a sparsity penalty (moefy train), then convert"
    line = f"moefy train {task} --model_name_or_path {name} --dataset_name DATA --output_dir OUT"
    if task == "causal_lm":
        return f"train it at its budget, which takes many tokens: {line} --recovery_epochs 1"
    if relu:
        return f"fine-tune it with a sparsity penalty: {line} --sparsity_penalty square_hoyer"
    return f"fine-tune it with ReLU and a sparsity penalty: {line} --activation relu --sparsity_penalty square_hoyer"


def eight_bits(model: PreTrainedModel, clock: Clock) -> list[str]:
    """Return how fast the dense model is in a runtime of eight bits, measured where one is installed."""
    name = "llama.cpp-q8_0" if clock.kind == LANGUAGE_MODEL else "onnxruntime-int8"
    if clock.load.runtime == name:
        return []
    if clock.kind == LANGUAGE_MODEL and clock.load.gguf is None:
        return [f"eight bits alone, without experts: --runtime {name} --dense FILE.gguf measures them here"]
    try:
        ENGINES[name].check_installed()
        masked = copy.deepcopy(model)
        moefy_(masked, UNFITTED, progress=False)
        ENGINES[name].check(check_moefied(masked), clock.load.gguf)
        speed = clock.dense_elsewhere(ENGINES[name], check_moefied(masked))
    except Exception as error:  # whatever a runtime finds: the plan is made, and is not to be lost
        return [f"eight bits alone, without experts; not measured: {error}"]
    return [f"eight bits alone: the dense model in {name} is {speed.ratio:.2f} times as fast as in PyTorch here"]
