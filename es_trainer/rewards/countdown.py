import ast
import operator
import re
from fractions import Fraction

from .text import completion_text


FORMAT_REWARD = 0.1
ANSWER_REWARD = 1.0

# Bounds the work that one completion can cause: nesting depth, size of the integers, time spent parsing.
MAX_EQUATION_LENGTH = 256

_TAG = re.compile(r"(</?(?:think|answer)>)")
# Python's own number syntax is wider than a puzzle's: 1_0, 0x1f and 1e3 must not reach the parser.
_EXPRESSION = re.compile(r"[0-9+\-*/()\s]+")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def countdown_reward(
    completions: list[str | list[dict[str, str]]], numbers: list[list[int]], target: list[int], **kwargs
) -> list[float]:
    """
    Reward for Countdown puzzles: 0.1 for the format and 1.0 for the answer, as in the paper.

    The format is right when the completion is one `<think>...</think>` block followed by one `<answer>...</answer>`
    block, with nothing but whitespace around them. The opening `<think>` may be absent, because some chat templates
    already put it at the end of the prompt.

    The answer is right when the last `<answer>...</answer>` block [`solves`] the puzzle, whatever the format.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Completions to score, as plain strings or in the conversational format.
        numbers (`list[list[int]]`):
            Dataset column with the numbers of each puzzle.
        target (`list[int]`):
            Dataset column with the target of each puzzle.
        **kwargs:
            The other dataset columns and whatever else the trainer passes. Not used.

    Returns:
        `list[float]`:
            One reward per completion: 0.0, 0.1, 1.0 or 1.1.
    """
    texts = [completion_text(completion) for completion in completions]
    return [
        FORMAT_REWARD * _is_well_formed(text)
        + ANSWER_REWARD * solves(_last_answer(text), puzzle_numbers, puzzle_target)
        for text, puzzle_numbers, puzzle_target in zip(texts, numbers, target, strict=True)
    ]


def solves(equation: str, numbers: list[int], target: int) -> bool:
    """
    Whether an equation solves a Countdown puzzle. Safe on any text: nothing in it is ever executed.

    Args:
        equation (`str`):
            Expression of non-negative integers, `+`, `-`, `*`, `/` and parentheses, whose intermediate values may be
            fractions. A tail such as `= 24` is accepted if its right side is the target, digit for digit. Signs
            (`-3`), other syntax and texts longer than `MAX_EQUATION_LENGTH` characters are not.
        numbers (`list[int]`):
            Numbers of the puzzle. The equation must use each of them exactly once, in any order.
        target (`int`):
            Value that the equation must have.

    Returns:
        `bool`:
            `True` if the equation is valid, uses the numbers as required and is exactly equal to the target.
    """
    expression, equals, result = equation.partition("=")
    if equals and result.strip() != str(target):
        return False
    if len(equation) > MAX_EQUATION_LENGTH or not _EXPRESSION.fullmatch(expression):
        return False
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        return _integers(tree) == sorted(numbers) and _value(tree) == target
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def _integers(tree: ast.expr) -> list[int]:
    return sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError(f"{type(node).__name__} is not part of a Countdown equation.")


def _is_well_formed(text: str) -> bool:
    match [part.strip() for part in _TAG.split(text)]:
        case ["", "<think>", _, "</think>", "", "<answer>", _, "</answer>", ""]:
            return True
        case [_, "</think>", "", "<answer>", _, "</answer>", ""]:
            return True
        case _:
            return False


def _last_answer(text: str) -> str:
    # Only the last answer counts, so that listing many guesses does not pay. Without a block this is "", which
    # solves nothing. A regular expression would take quadratic time on a text of many opening tags.
    before, _, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer if opening else ""
