"""MoEfied BERT.

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
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)

from .moefied import MoefiedMixin


class MoefiedBertModel(MoefiedMixin, BertModel):
    _auto_class = "AutoModel"


class MoefiedBertLMHeadModel(MoefiedMixin, BertLMHeadModel):
    _auto_class = "AutoModelForCausalLM"


class MoefiedBertForMaskedLM(MoefiedMixin, BertForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedBertForSequenceClassification(MoefiedMixin, BertForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedBertForTokenClassification(MoefiedMixin, BertForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedBertForQuestionAnswering(MoefiedMixin, BertForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedBertForMultipleChoice(MoefiedMixin, BertForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"


class MoefiedBertForPreTraining(MoefiedMixin, BertForPreTraining):
    _auto_class = "AutoModelForPreTraining"


class MoefiedBertForNextSentencePrediction(MoefiedMixin, BertForNextSentencePrediction):
    _auto_class = "AutoModelForNextSentencePrediction"
