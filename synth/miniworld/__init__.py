"""An invented world to try the whole pipeline on: articles, QA data sets, instructions, held-out questions, a judge.

Everything about entity k follows from (seed, k) by arithmetic: nothing is stored, any number of articles streams out in
constant memory, and `judge` can look every fact up again.
"""

from synth.miniworld.questions import judge
from synth.miniworld.world import World
from synth.miniworld.write import open_world, run_miniworld

__all__ = ["World", "judge", "open_world", "run_miniworld"]
