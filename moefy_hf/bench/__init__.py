"""How fast a MoEfied model is on this machine's CPU: its FFNs alone (`bench_ffns`), whole (`bench_model`), or beside
what a user would pick instead (`bench_against`)."""

from .ffns import bench_ffns
from .models import bench_model
from .presets import PRESETS
from .report import table
from .settings import Settings
from .side_by_side import SideBySide, bench_against
from .tasks import Reading

__all__ = [
    "PRESETS",
    "Reading",
    "Settings",
    "SideBySide",
    "bench_against",
    "bench_ffns",
    "bench_model",
    "table",
]
