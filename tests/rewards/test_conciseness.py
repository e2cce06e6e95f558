import pytest

from es_trainer.rewards import conciseness_reward


def test_reward_is_minus_the_difference_in_characters():
    completions = ["Paris.", "It is Paris.", "", "Émile"]
    rewards = conciseness_reward(completions, answer=["Paris.", "Paris.", "Paris.", "Emile"], prompts=["?"] * 4)
    assert rewards == [0.0, -6.0, -6.0, 0.0]
    assert all(isinstance(reward, float) for reward in rewards)


def test_conversational_completions_count_only_the_content():
    completions = [[{"role": "assistant", "content": "It is Paris."}]]
    assert conciseness_reward(completions, answer=["Paris."], completion_ids=[[1, 2]]) == [-6.0]


def test_whitespace_counts():
    assert conciseness_reward([" Paris.\n"], answer=["Paris."]) == [-2.0]


def test_columns_of_another_length_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        conciseness_reward(["Paris."], answer=["Paris.", "Rome."])
