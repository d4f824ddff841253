"""What is timed and measured of each kind of model."""

from ..engines.base import ENCODER, ENCODER_DECODER, LANGUAGE_MODEL
from .base import Reading, Task, Timed
from .encoder_decoders import EncoderDecoderTask
from .encoders import EncoderTask
from .inputs import load_processor
from .language_models import LanguageTask

TASKS: dict[str, type[Task]] = {
    ENCODER: EncoderTask,
    LANGUAGE_MODEL: LanguageTask,
    ENCODER_DECODER: EncoderDecoderTask,
}

__all__ = ["TASKS", "Reading", "Task", "Timed", "load_processor"]
