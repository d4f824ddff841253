"""See the experts: what each responds to, what happens without it, and a report to open."""

from .ablation import ablate, remove_together, split_by_class
from .analyze import Analysis, analyze
from .measuring import measure_load
from .partitions import compare_partitions
from .pruning import least_needed, least_used, prune
from .report import write_report
from .texts import TextStream

__all__ = [
    "Analysis",
    "TextStream",
    "ablate",
    "analyze",
    "compare_partitions",
    "least_needed",
    "least_used",
    "measure_load",
    "prune",
    "remove_together",
    "split_by_class",
    "write_report",
]
