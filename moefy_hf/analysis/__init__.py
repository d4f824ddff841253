"""See the experts: what each responds to, what happens without it, and a report to open."""

from .analysing import Analysis, analyze
from .texts import TextStream

__all__ = ["Analysis", "TextStream", "analyze"]
