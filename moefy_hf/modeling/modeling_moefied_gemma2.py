"""MoEfied Gemma 2.

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
from transformers import Gemma2ForCausalLM, Gemma2ForSequenceClassification, Gemma2ForTokenClassification, Gemma2Model

from .moefied import MoefiedMixin


class MoefiedGemma2Model(MoefiedMixin, Gemma2Model):
    _auto_class = "AutoModel"


class MoefiedGemma2ForCausalLM(MoefiedMixin, Gemma2ForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGemma2ForSequenceClassification(MoefiedMixin, Gemma2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedGemma2ForTokenClassification(MoefiedMixin, Gemma2ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"
