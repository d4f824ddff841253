"""MoEfied DeBERTa-v2 and -v3.

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
    DebertaV2ForMaskedLM,
    DebertaV2ForMultipleChoice,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
)

from .moefied import MoefiedMixin


class MoefiedDebertaV2Model(MoefiedMixin, DebertaV2Model):
    _auto_class = "AutoModel"


class MoefiedDebertaV2ForMaskedLM(MoefiedMixin, DebertaV2ForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"


class MoefiedDebertaV2ForSequenceClassification(MoefiedMixin, DebertaV2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"


class MoefiedDebertaV2ForTokenClassification(MoefiedMixin, DebertaV2ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"


class MoefiedDebertaV2ForQuestionAnswering(MoefiedMixin, DebertaV2ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"


class MoefiedDebertaV2ForMultipleChoice(MoefiedMixin, DebertaV2ForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"
