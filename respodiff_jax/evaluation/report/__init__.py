"""Pages for people: `report.html` of an evaluation, and several evaluations side by side."""

from respodiff_jax.evaluation.report.comparison import compare
from respodiff_jax.evaluation.report.evaluation import write_report
from respodiff_jax.evaluation.report.sections import has_losses

__all__ = ["compare", "has_losses", "write_report"]
