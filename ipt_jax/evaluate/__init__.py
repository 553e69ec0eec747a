"""Scores a model on tasks, with standard errors: `run_eval`, and `HarnessLM` for lm-evaluation-harness."""

from ipt_jax.evaluate.run import run_eval

__all__ = ["run_eval"]
