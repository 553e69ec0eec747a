"""Pictures of training runs: `run_report` writes one HTML page. Plain Python and inline SVG; imports no jax."""

from ipt_jax.report.page import run_report

__all__ = ["run_report"]
