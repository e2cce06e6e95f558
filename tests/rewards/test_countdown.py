import time

import pytest

from es_trainer.rewards import completion_text, countdown_reward, solves
from es_trainer.rewards.countdown import MAX_EQUATION_LENGTH


def reward(completion, numbers=(2, 3, 4), target=20):
    columns = {"prompts": ["?"], "completion_ids": [[0]], "trainer_state": None}
    (value,) = countdown_reward(completions=[completion], numbers=[list(numbers)], target=[target], **columns)
    return value


@pytest.mark.parametrize(
    ("equation", "numbers", "target"),
    [
        ("(2 + 3) * 4", [2, 3, 4], 20),
        ("4*(3+2)", [2, 3, 4], 20),
        ("\n (2 + 3) * 4 \n", [2, 3, 4], 20),
        ("2 - 3 + 4", [2, 3, 4], 3),
        ("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24),
        ("1 / 3 * 6", [1, 3, 6], 2),
        ("(2 + 3) * 4 = 20", [2, 3, 4], 20),
    ],
)
def test_solutions(equation, numbers, target):
    assert solves(equation, numbers, target)


@pytest.mark.parametrize(
    ("equation", "numbers", "target"),
    [
        pytest.param("2 + 3 * 4", [2, 3, 4], 20, id="wrong value"),
        pytest.param("5 * 4", [2, 3, 4], 20, id="other numbers"),
        pytest.param("4 * 5", [4, 5, 1], 20, id="number left out"),
        pytest.param("2 + 2", [2], 4, id="number used twice"),
        pytest.param("2 * 3 * 3", [2, 2, 3], 18, id="multiset, not set"),
        pytest.param("9007199254740993 / 1", [9007199254740993, 1], 9007199254740992, id="exact, not float"),
        pytest.param("7 / 2 + 1", [7, 2, 1], 4, id="division is not floored"),
        pytest.param("4 / (2 - 2)", [2, 2, 4], 0, id="division by zero"),
        pytest.param("(2 + 3) * 4 = 21", [2, 3, 4], 20, id="wrong right side"),
        pytest.param("(2 + 3) * 4 =", [2, 3, 4], 20, id="empty right side"),
        pytest.param("(2 + 3) * 4 = 19 + 1", [2, 3, 4], 20, id="right side is no literal"),
        pytest.param("(2 + 3) * 4 = 20 = 20", [2, 3, 4], 20, id="two equal signs"),
        pytest.param("20 = (2 + 3) * 4", [2, 3, 4], 20, id="sides swapped"),
        pytest.param("", [], 0, id="empty"),
        pytest.param("()", [], 0, id="empty tuple"),
        pytest.param("20", [2, 3, 4], 20, id="target alone"),
    ],
)
def test_wrong_equations(equation, numbers, target):
    assert not solves(equation, numbers, target)


@pytest.mark.parametrize(
    ("equation", "numbers", "target"),
    [
        pytest.param("2 ** 3", [2, 3], 8, id="power"),
        pytest.param("7 // 2", [7, 2], 3, id="floor division"),
        pytest.param("-2 + 3", [2, 3], 1, id="minus sign"),
        pytest.param("+2 + 3", [2, 3], 5, id="plus sign"),
        pytest.param("7 % 4", [7, 4], 3, id="modulo"),
        pytest.param("2 | 4", [2, 4], 6, id="bit operator"),
        pytest.param("1_0 + 3", [10, 3], 13, id="underscore"),
        pytest.param("0x10 + 3", [16, 3], 19, id="hexadecimal"),
        pytest.param("2.0 + 3", [2, 3], 5, id="float"),
        pytest.param("1e1 + 3", [10, 3], 13, id="exponent"),
        pytest.param("٢ + 3", [2, 3], 5, id="Arabic digit"),
        pytest.param("２ + 3", [2, 3], 5, id="full-width digit"),
        pytest.param("2\u2003+ 3", [2, 3], 5, id="em space"),
        pytest.param("2 × 3", [2, 3], 6, id="multiplication sign"),
        pytest.param("True + 3", [1, 3], 4, id="boolean"),
        pytest.param("x + 3", [3], 3, id="name"),
        pytest.param("abs(3) + 2", [2, 3], 5, id="call"),
        pytest.param("2 + 3 # ok", [2, 3], 5, id="comment"),
        pytest.param("2 + 3\n+ 4", [2, 3, 4], 9, id="two lines"),
        pytest.param("2 + 3\0", [2, 3], 5, id="null byte"),
        pytest.param("__import__('os').abort()", [], 0, id="code"),
    ],
)
def test_syntax_outside_the_puzzle_is_refused(equation, numbers, target):
    assert not solves(equation, numbers, target)


@pytest.mark.parametrize(
    "equation",
    [
        "9**9**9",
        "9" * 100_000,
        "*".join(["9" * 5_000] * 100),
        "(" * 200,
        "(" * 100_000,
        "(" * 120 + "5" + ")" * 120,
        "(" * 100_000 + "5" + ")" * 100_000,
        "-" * 100_000 + "5",
        "1+" * 500_000 + "1",
        "=" * 1_000_000,
        " " * 5_000_000,
        "((1 " * 60,
    ],
    ids=lambda equation: f"{equation[:10]} ({len(equation)} characters)",
)
def test_hostile_equations_are_wrong_and_quick(equation):
    start = time.perf_counter()
    assert not solves(equation, [9, 9, 9], 24)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
def test_a_parser_that_gives_up_means_wrong(monkeypatch, error):
    def parse(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:  # undone before pytest itself needs the parser
        patch.setattr("es_trainer.rewards.countdown.ast.parse", parse)
        verdict = solves("2 + 3", [2, 3], 5)
    assert not verdict


def test_length_limit():
    fits = "2 + 3".ljust(MAX_EQUATION_LENGTH)
    assert solves(fits, [2, 3], 5)
    assert not solves(fits + " ", [2, 3], 5)
    assert MAX_EQUATION_LENGTH < 1000


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>5 times 4</think><answer>(2 + 3) * 4</answer>", 1.1),
        ("\n<think>\n5 times 4,\nor 1 < 2\n</think>\n\n<answer> (2 + 3) * 4 = 20 </answer>\n", 1.1),
        ("5 times 4</think>\n<answer>(2 + 3) * 4</answer>", 1.1),  # the prompt opened <think>
        ("<think>5 times 4</think><answer>2 + 3 + 4</answer>", 0.1),
        ("<think>5 times 4</think><answer>(2 + 3) * 4, or so</answer>", 0.1),
        ("<think></think><answer></answer>", 0.1),
        ("<answer>(2 + 3) * 4</answer>", 1.0),
        ("<answer>(2 + 3) * 4</answer><think>5 times 4</think>", 1.0),
        ("Hi! <think>5 times 4</think><answer>(2 + 3) * 4</answer>", 1.0),
        ("<think>5 times 4</think> So: <answer>(2 + 3) * 4</answer>", 1.0),
        ("<think>5 times 4</think><answer>(2 + 3) * 4</answer> Done.", 1.0),
        ("<think>a</think><think>b</think><answer>(2 + 3) * 4</answer>", 1.0),
        ("<think>a<think>b</think><answer>(2 + 3) * 4</answer>", 1.0),
        ("<think>a</think><answer>2</answer><answer>(2 + 3) * 4</answer>", 1.0),
        ("<think>a</think><answer>(2 + 3) * 4</answer><answer>2</answer>", 0.0),
        ("<think>a</think><answer>(2 + 3) * 4", 0.0),
        ("<think>a</think>(2 + 3) * 4</answer>", 0.0),
        ("(2 + 3) * 4</answer>", 0.0),
        ("(2 + 3) * 4", 0.0),
        ("", 0.0),
    ],
)
def test_reward_adds_format_and_answer(completion, expected):
    assert reward(completion) == pytest.approx(expected)
    assert reward([{"role": "assistant", "content": completion}]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "completion", ["<answer>" * 200_000, "<think>" * 200_000, "</answer>" * 200_000, "<" * 2_000_000, " " * 2_000_000]
)
def test_hostile_completions_are_quick(completion):
    start = time.perf_counter()
    assert reward(completion) == 0.0
    assert time.perf_counter() - start < 1.5


def test_each_completion_is_scored_against_its_own_row():
    completions = ["<answer>2 + 3</answer>", "<answer>2 + 3</answer>", "<answer>6 / 3</answer>"]
    assert countdown_reward(completions, numbers=[[3, 2], [2, 3], [3, 6]], target=[5, 6, 2]) == [1.0, 0.0, 1.0]


def test_columns_of_another_length_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        countdown_reward(["<answer>2</answer>"], numbers=[[2], [2]], target=[2, 2])


def test_completion_text():
    assert completion_text("plain") == "plain"
    assert completion_text([{"role": "assistant", "content": "chat"}]) == "chat"
