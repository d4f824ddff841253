"""MoEfied Gemma 3 (text).

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
from transformers import Gemma3ForCausalLM, Gemma3TextForSequenceClassification, Gemma3TextModel

from .moefied import MoefiedMixin


class MoefiedGemma3TextModel(MoefiedMixin, Gemma3TextModel):
    _auto_class = "AutoModel"


class MoefiedGemma3ForCausalLM(MoefiedMixin, Gemma3ForCausalLM):
    _auto_class = "AutoModelForCausalLM"


class MoefiedGemma3TextForSequenceClassification(MoefiedMixin, Gemma3TextForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"
