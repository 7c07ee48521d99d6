"""What people look at: `report.html` of an evaluation, and several evaluations side by side."""

from respodiff_jax.evaluation.report.comparison import write_comparison
from respodiff_jax.evaluation.report.evaluation import write_report

__all__ = ["write_comparison", "write_report"]
