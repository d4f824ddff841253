"""See the experts: what each responds to, what happens without it, and a report to open."""

from .ablation import ablate, remove_together
from .analyze import Analysis, analyze
from .partitions import compare_partitions
from .pruning import prune
from .report import write_report
from .texts import TextStream

__all__ = [
    "Analysis",
    "TextStream",
    "ablate",
    "analyze",
    "compare_partitions",
    "prune",
    "remove_together",
    "write_report",
]
