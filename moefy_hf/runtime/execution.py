"""How a MoEfied model's FFNs run: masked (dense compute, then mask), or by a backend that computes selected experts.

Models import this module by its name, see `MoefiedMixin.set_moe_implementation`.
"""

from transformers.utils import logging

from ..errors import MoefyError
from ..loading import MoefiedModel, check_code
from .backends import BACKENDS, best_for
from .sparse_ffn import SparseFfn, misfit, sparse_ffn_of

logger = logging.get_logger("moefy_hf")


def set_implementation_(model: MoefiedModel, name: str) -> None:
    """See `MoefiedMixin.set_moe_implementation`.

    Raises:
        MoefyError: an unknown name, or an FFN that cannot run so; "auto" leaves such FFNs masked.
        ImportError: the backend has to be installed.
    """
    if name not in ("auto", "masked", *BACKENDS):
        raise MoefyError(f"unknown implementation {name!r}; choose from auto, masked, {', '.join(BACKENDS)}")
    check_code(model)
    sites = model.moe_sites()
    if name in BACKENDS:
        BACKENDS[name].require()
    backend = BACKENDS.get(best_for(model.device.type) if name == "auto" else name)  # None: masked
    misfits = [None if backend is None else misfit(site, backend) for site in sites]
    unfit = [f"{site.name}: {reason}" for site, reason in zip(sites, misfits, strict=True) if reason is not None]
    if unfit and name == "auto":
        logger.warning_once(f"{len(unfit)} of {len(sites)} FFNs run masked: {unfit[0]}")
    elif unfit:
        raise MoefyError(f"implementation {name!r} cannot run {unfit[0]}")
    for site, reason in zip(sites, misfits, strict=True):
        if (current := sparse_ffn_of(site)) is not None:
            current.remove_()
        if backend is not None and reason is None:
            SparseFfn(backend(site), name == "auto").install_()
