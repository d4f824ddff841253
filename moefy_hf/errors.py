"""What moefy_hf raises about its input; everything here is a `MoefyError`, which is a ValueError.

Example:
    >>> try:
    ...     moefy_(model, MoEficationConfig(expert_size=7), batches)
    ... except MoefyError as error:
    ...     print(error)
"""

from .modeling.errors import MoefyError as MoefyError


class UnsupportedModel(MoefyError):
    """The model's architecture, head or state is none that can be MoEfied or loaded."""


class NotMoefied(MoefyError):
    """A MoEfied model or checkpoint is needed, and this one is dense."""


class CalibrationError(MoefyError):
    """Calibration data is missing, too small, of another model, or not finite."""


class VerificationError(MoefyError):
    """A checkpoint does not load, or not as what it should be, where this package is not installed."""


class PushError(MoefyError):
    """The Hub refused, or could not be reached."""
