"""MoEfied ModernBERT.

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
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)

from .moefied import MoefiedMixin


class MoefiedModernBertModel(MoefiedMixin, ModernBertModel):
    _auto_class = "AutoModel"


class MoefiedModernBertForMaskedLM(MoefiedMixin, ModernBertForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedModernBertForSequenceClassification(MoefiedMixin, ModernBertForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedModernBertForTokenClassification(MoefiedMixin, ModernBertForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedModernBertForQuestionAnswering(MoefiedMixin, ModernBertForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedModernBertForMultipleChoice(MoefiedMixin, ModernBertForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"
