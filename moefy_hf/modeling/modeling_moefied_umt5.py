"""MoEfied UMT5.

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
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
    UMT5ForQuestionAnswering,
    UMT5ForSequenceClassification,
    UMT5ForTokenClassification,
    UMT5Model,
)

from .moefied import MoefiedMixin


class MoefiedUMT5Model(MoefiedMixin, UMT5Model):
    _auto_class = "AutoModel"


class MoefiedUMT5EncoderModel(MoefiedMixin, UMT5EncoderModel):
    _auto_class = "AutoModelForTextEncoding"


class MoefiedUMT5ForConditionalGeneration(MoefiedMixin, UMT5ForConditionalGeneration):
    _auto_class = "AutoModelForSeq2SeqLM"


class MoefiedUMT5ForSequenceClassification(MoefiedMixin, UMT5ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedUMT5ForTokenClassification(MoefiedMixin, UMT5ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedUMT5ForQuestionAnswering(MoefiedMixin, UMT5ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
