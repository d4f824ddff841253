"""MoEfied Whisper."""

from transformers import (
    WhisperForAudioClassification,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from .moefied import MoefiedMixin


class MoefiedWhisperModel(MoefiedMixin, WhisperModel):
    _auto_class = "AutoModel"


class MoefiedWhisperForCausalLM(MoefiedMixin, WhisperForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedWhisperForConditionalGeneration(MoefiedMixin, WhisperForConditionalGeneration):
    _auto_class = "AutoModelForSpeechSeq2Seq"


class MoefiedWhisperForAudioClassification(MoefiedMixin, WhisperForAudioClassification):
    _auto_class = "AutoModelForAudioClassification"
