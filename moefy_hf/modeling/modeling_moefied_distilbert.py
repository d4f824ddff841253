"""MoEfied DistilBERT.

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
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)

from .moefied import MoefiedMixin


class MoefiedDistilBertModel(MoefiedMixin, DistilBertModel):
    _auto_class = "AutoModel"


class MoefiedDistilBertForMaskedLM(MoefiedMixin, DistilBertForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedDistilBertForSequenceClassification(MoefiedMixin, DistilBertForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedDistilBertForTokenClassification(MoefiedMixin, DistilBertForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedDistilBertForQuestionAnswering(MoefiedMixin, DistilBertForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedDistilBertForMultipleChoice(MoefiedMixin, DistilBertForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"
