"""Scores a model on task files, with standard errors: `run_eval`."""

from ipt_jax.evaluate.run import run_eval

__all__ = ["run_eval"]
