"""`ipt show`: rows of a plan as a person reads them, before anything is trained on them."""

from ipt_jax.show.command import run_show

__all__ = ["run_show"]
