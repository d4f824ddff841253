"""How fast a MoEfied model is on this machine's CPU: its FFNs alone (`bench_ffns`), or whole (`bench_model`)."""

from .ffns import bench_ffns
from .models import bench_model
from .presets import PRESETS
from .report import table
from .settings import Settings

__all__ = ["PRESETS", "Settings", "bench_ffns", "bench_model", "table"]
