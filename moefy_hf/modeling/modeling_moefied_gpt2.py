"""MoEfied GPT-2.

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
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from .moefied import MoefiedMixin


class MoefiedGPT2Model(MoefiedMixin, GPT2Model):
    _auto_class = "AutoModel"


class MoefiedGPT2LMHeadModel(MoefiedMixin, GPT2LMHeadModel):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGPT2ForSequenceClassification(MoefiedMixin, GPT2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedGPT2ForTokenClassification(MoefiedMixin, GPT2ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedGPT2ForQuestionAnswering(MoefiedMixin, GPT2ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
