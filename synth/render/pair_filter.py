"""The filter expression of `synth render`: comparisons over a pair's scores, joined by and, or, not.

Guaranteed: nothing is executed; the expression is read as a tree and only names, numbers, comparisons, and/or/not pass.
A pair that lacks a score fails every comparison with it. `well_formed` is 1 for a pair that the parser accepted.
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
JOINTS = (ast.And, ast.Or, ast.Not, ast.USub, ast.Load)
EXAMPLE = 'expected scores, numbers, comparisons, and/or/not, for example "grounded >= 0.3 and well_formed"'


@lru_cache(maxsize=16)
def read_keep(expression: str) -> ast.expr:
    """The expression's tree. Raises ValueError when it holds anything but what the module promises."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"no expression that can be read; {EXAMPLE}") from error
    for node in ast.walk(tree):
        if not is_allowed(node):
            raise ValueError(f"{ast.unparse(node) or type(node).__name__!r} is not allowed; {EXAMPLE}")
    return tree


def is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    shapes = (ast.Name, ast.BoolOp, ast.UnaryOp, ast.Compare, *COMPARE, *JOINTS)
    return isinstance(node, shapes)


def keeps(expression: str | None, pair: Pair) -> bool:
    """Whether an accepted pair stays."""
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
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(is_true(value(part, scores)) for part in parts)
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(is_true(value(part, scores)) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others):
            numbers = [value(part, scores) for part in (left, *others)]
            if any(isnan(number) for number in numbers):
                return False
            steps = zip(ops, numbers, numbers[1:], strict=False)
            return all(COMPARE[type(op)](before, after) for op, before, after in steps)
    raise AssertionError(ast.dump(node))


def check_scores(expression: str, groups: Iterable[SynthGroup]) -> None:
    """Raises UserError when a name in the expression is the score of no pair. Reads on until each was seen once."""
    wanted = {node.id for node in ast.walk(read_keep(expression)) if isinstance(node, ast.Name)} - {WELL_FORMED}
    known: set[str] = set()
    for group in groups if wanted else ():
        known.update(*(pair.scores for text in group.texts for pair in text.pairs))
        if wanted <= known:
            return
    if wanted:
        missing = ", ".join(sorted(wanted - known))
        found = ", ".join([*sorted(known), WELL_FORMED])
        raise UserError(f"keep: no pair has the score {missing}; known here: {found}; synth verify adds scores")
