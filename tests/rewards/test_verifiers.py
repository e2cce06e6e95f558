import inspect
import re

import pytest

from es_trainer.rewards.reasoning_gym import entry_from_json, entry_to_json, verifier
from es_trainer.tasks.reasoning_gym import RUN_THE_ANSWER


pytest.importorskip("reasoning_gym", reason="its dependency pycosat was not compiled")

from reasoning_gym.factory import DATASETS, create_dataset


ENTRY = {
    "question": "?",
    "answer": "1",
    "metadata": {"grid": ((1, 2), (3, 4)), "rows": [[1], (2,)], "colors": {0: "red", (1, 2): None}, "empty": ()},
}
# Those with a right answer in their entries, and those that raise if the answer has another form
NAMES = ["mini_sudoku", "arc_agi", "rearc", "gsm_symbolic", "game_of_life", "prime_factorization"]


def test_entries_come_back_from_json():
    assert entry_from_json(entry_to_json(ENTRY)) == ENTRY


@pytest.mark.parametrize("name", NAMES)
def test_right_and_odd_answers(name):
    generator = create_dataset(name, seed=3, size=8)
    entries = list(generator)
    column = [entry_to_json(entry) for entry in entries]
    reward = verifier(generator, "named")
    assert reward.__name__ == "named"

    def score(write):
        completions = [[{"role": "assistant", "content": write(entry["answer"])}] for entry in entries]
        return reward(completions=completions, entry=column, prompts=None)

    # Tuples have to stay tuples: arc_agi and rearc would give a right grid 0.05
    assert score(lambda answer: f"<think>5</think> <answer>{answer}</answer>") == [1.0] * 8
    assert score(lambda answer: f"<answer>7 7</answer> <answer>\n{answer}\n</answer>") == [1.0] * 8
    assert score(lambda answer: answer) == [0.0] * 8
    for odd in ("", "<answer>", "<answer></answer>", "<answer>{}</answer>", "<answer>\x00 ²</answer>", "</answer>"):
        assert all(0.0 <= points < 1.0 for points in score(lambda answer, odd=odd: odd))


def test_completions_as_text():
    generator = create_dataset("mini_sudoku", seed=3, size=1)
    reward = verifier(generator, "named")
    assert reward([f"<answer>{generator[0]['answer']}</answer>"], [entry_to_json(generator[0])]) == [1.0]


def test_the_configuration_of_the_generator_counts():
    entry = {"question": "1 / 3?", "answer": "0.333", "metadata": {}}
    coarse, fine = (
        verifier(create_dataset("decimal_arithmetic", max_num_decimal_places=places, precision=12), "named")
        for places in (3, 9)
    )
    assert coarse(["<answer>0.33301</answer>"], [entry_to_json(entry)]) == [1.0]
    assert fine(["<answer>0.33301</answer>"], [entry_to_json(entry)]) < [1.0]


def test_no_verifier_runs_what_a_model_wrote():
    found = {
        name
        for name, (generator, _) in DATASETS.items()
        if re.search(r"\b(eval|exec|parse_expr|sympify)\(", inspect.getsource(generator.score_answer))
    }
    # Of these two, one evaluates the right answer, and the other has a parser of its own
    assert found - {"number_sorting", "propositional_logic"} == RUN_THE_ANSWER
