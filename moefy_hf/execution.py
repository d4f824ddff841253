"""What the code that came with older checkpoints asks for by this name; see `runtime/execution.py`."""

from .runtime.execution import set_implementation_

__all__ = ["set_implementation_"]
