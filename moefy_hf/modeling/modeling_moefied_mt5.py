"""MoEfied mT5.

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
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    MT5ForQuestionAnswering,
    MT5ForSequenceClassification,
    MT5ForTokenClassification,
    MT5Model,
)

from .moefied import MoefiedMixin


class MoefiedMT5Model(MoefiedMixin, MT5Model):
    _auto_class = "AutoModel"


class MoefiedMT5EncoderModel(MoefiedMixin, MT5EncoderModel):
    _auto_class = "AutoModelForTextEncoding"


class MoefiedMT5ForConditionalGeneration(MoefiedMixin, MT5ForConditionalGeneration):
    _auto_class = "AutoModelForSeq2SeqLM"


class MoefiedMT5ForSequenceClassification(MoefiedMixin, MT5ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedMT5ForTokenClassification(MoefiedMixin, MT5ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedMT5ForQuestionAnswering(MoefiedMixin, MT5ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
