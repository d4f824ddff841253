"""How this package's own code sees a MoEfied model. This file does not travel with checkpoints."""

from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from .ffn_sites import FfnSite
from .routed_activation import RoutedActivation, is_routed

if TYPE_CHECKING:
    from .moefied import MoefiedMixin

    class MoefiedModel(MoefiedMixin, PreTrainedModel):
        """The type of MoEfied models, from this package's classes or from a checkpoint's own code.

        It is for annotations alone: `loading.check_moefied` is what tells a MoEfied model from a dense one.
        """
else:
    MoefiedModel = PreTrainedModel


def routed(site: FfnSite) -> RoutedActivation:
    """Return the routed activation of one FFN of a MoEfied model.

    The check goes by name: a model that was loaded with `trust_remote_code` has its checkpoint's own classes.

    Raises:
        TypeError: the FFN is dense.
    """
    if not is_routed(site.act):
        raise TypeError(f"{site.name} is a dense FFN, and has no experts")
    return cast(RoutedActivation, site.act)
