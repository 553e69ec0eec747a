"""The `keep` expression of `synth render`: comparisons of a pair's scores, joined by and, or, not.

Guarantees: the expression is parsed, never executed; only names, numbers, comparisons, and/or/not are allowed. A
comparison with a score that the pair lacks is false. `well_formed` is 1 for a pair that the parser accepted.
"""

import ast
import operator
from collections.abc import Callable, Iterable
from functools import lru_cache
from math import isnan, nan

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Pair, SynthGroup

WELL_FORMED = "well_formed"
COMPARE: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
ALLOWED = (ast.Name, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.And, ast.Or, ast.Not, ast.USub, ast.Load, *COMPARE)
EXAMPLE = 'expected scores, numbers, comparisons, and/or/not, for example "grounded >= 0.3 and well_formed"'


@lru_cache(maxsize=16)
def read_keep(expression: str) -> ast.expr:
    """The expression's tree. Raises ValueError for anything that the module docstring does not allow."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"not an expression; {EXAMPLE}") from error
    for node in ast.walk(tree):
        is_number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        if not is_number and not isinstance(node, ALLOWED):
            raise ValueError(f"{ast.unparse(node) or type(node).__name__!r} is not allowed; {EXAMPLE}")
    return tree


def keeps(expression: str | None, pair: Pair) -> bool:
    """Whether an accepted pair passes the filter."""
    if expression is None:
        return True
    return is_true(value(read_keep(expression), {**pair.scores, WELL_FORMED: float(pair.accepted)}))


def is_true(number: float) -> bool:
    return number != 0 and not isnan(number)


def value(node: ast.expr, scores: dict[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return scores.get(name, nan)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not is_true(value(inner, scores))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -value(inner, scores)
        case ast.BoolOp(op=joint, values=parts):
            decide = all if isinstance(joint, ast.And) else any
            return decide(is_true(value(part, scores)) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others):
            numbers = [value(part, scores) for part in (left, *others)]
            if any(isnan(number) for number in numbers):
                return False
            steps = zip(ops, numbers, numbers[1:], strict=False)
            return all(COMPARE[type(op)](before, after) for op, before, after in steps)
    raise AssertionError(ast.dump(node))


def check_scores(expression: str, groups: Iterable[SynthGroup]) -> None:
    """Raises UserError if no pair has a score that the expression names. Reads groups until each name was found."""
    missing = {node.id for node in ast.walk(read_keep(expression)) if isinstance(node, ast.Name)} - {WELL_FORMED}
    known: set[str] = set()
    for group in groups if missing else ():
        known.update(*(pair.scores for text in group.texts for pair in text.pairs))
        if missing <= known:
            return
    if missing:
        names, found = ", ".join(sorted(missing - known)), ", ".join([*sorted(known), WELL_FORMED])
        raise UserError(f"keep: no pair has the score {names}; scores here: {found}; synth verify adds scores")
