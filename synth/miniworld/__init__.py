"""A synthetic world to try the complete pipeline on: articles, QA data sets, instructions, held-out questions, a judge.

Everything about entity k is computed from (seed, k). `judge` can look up every fact.
"""

from synth.miniworld.questions import judge
from synth.miniworld.world import World
from synth.miniworld.write import open_world, run_miniworld

__all__ = ["World", "judge", "open_world", "run_miniworld"]
