"""MoEfied T5.

The files that it needs, named here for transformers 4, which copies no others and would not get to `needs`:

from .adapters import *
from .budget_allocation import *
from .errors import *
from .ffn_layouts import *
from .ffn_sites import *
from .ffn_weights import *
from .install import *
from .interventions import *
from .moefied import *
from .needs import *
from .routed_activation import *
from .router_base import *
from .router_pre_gated import *
from .routers import *
from .routers_from_weights import *
from .routers_trained import *
from .section import *
from .selection import *
from .selection_config import *
from .threshold_tables import *
"""

from .needs import TRANSFORMERS  # noqa: F401

# isort: split
from transformers import (
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)

from .moefied import MoefiedMixin


class MoefiedT5Model(MoefiedMixin, T5Model):
    _auto_class = "AutoModel"


class MoefiedT5EncoderModel(MoefiedMixin, T5EncoderModel):
    _auto_class = "AutoModelForTextEncoding"


class MoefiedT5ForConditionalGeneration(MoefiedMixin, T5ForConditionalGeneration):
    _auto_class = "AutoModelForSeq2SeqLM"


class MoefiedT5ForSequenceClassification(MoefiedMixin, T5ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedT5ForTokenClassification(MoefiedMixin, T5ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedT5ForQuestionAnswering(MoefiedMixin, T5ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
