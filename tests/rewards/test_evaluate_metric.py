import importlib.util
import sys

import pytest

from es_trainer.rewards import evaluate_reward


METRIC_SOURCE = """
import datasets
import evaluate


class SameText(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of predictions equal to their reference, and their count.",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, ignore_case=False, with_count=False):
        if ignore_case:
            predictions = [text.lower() for text in predictions]
            references = [text.lower() for text in references]
        pairs = list(zip(predictions, references, strict=True))
        result = {"same": sum(prediction == reference for prediction, reference in pairs) / len(pairs)}
        return result | {"count": len(pairs)} if with_count else result
"""


@pytest.fixture(scope="module")
def metric_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics") / "same_text"
    folder.mkdir()
    (folder / "same_text.py").write_text(METRIC_SOURCE)
    return folder


@pytest.fixture(scope="module")
def metric(metric_folder):
    spec = importlib.util.spec_from_file_location("same_text_for_tests", metric_folder / "same_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SameText()


COMPLETIONS = ["Paris", "paris", [{"role": "assistant", "content": "Rome"}]]
REFERENCES = ["Paris", "Paris", "Rome"]


def test_metric_object_scores_row_by_row(metric):
    reward = evaluate_reward(metric)
    rewards = reward(prompts=["?"] * 3, completions=COMPLETIONS, completion_ids=[[0]] * 3, answer=REFERENCES)
    assert rewards == [1.0, 0.0, 1.0]
    assert all(isinstance(value, float) for value in rewards)


def test_metric_loaded_from_a_path(metric_folder):
    reward = evaluate_reward(str(metric_folder))
    assert reward(completions=COMPLETIONS, answer=REFERENCES) == [1.0, 0.0, 1.0]
    assert reward.__name__ == "same_text"


def test_name_is_the_metrics_name(metric):
    assert evaluate_reward(metric).__name__ == "same_text"


def test_compute_kwargs_reach_the_metric(metric):
    reward = evaluate_reward(metric, ignore_case=True)
    assert reward(completions=COMPLETIONS, answer=REFERENCES) == [1.0, 1.0, 1.0]


def test_reference_column(metric):
    reward = evaluate_reward(metric, reference_column="solution")
    assert reward(completions=["a"], solution=["a"], answer=["b"]) == [1.0]


def test_missing_reference_column(metric):
    reward = evaluate_reward(metric, reference_column="solution")
    with pytest.raises(ValueError, match=r"reference_column='solution'.*\['answer', 'prompts'\].*Set `reference_col"):
        reward(prompts=["?"], completions=["a"], answer=["a"])


def test_score_picks_one_result(metric):
    reward = evaluate_reward(metric, score="count", with_count=True)
    counts = reward(completions=COMPLETIONS, answer=REFERENCES)
    assert counts == [1.0, 1.0, 1.0]
    assert all(isinstance(count, float) for count in counts)
    reward = evaluate_reward(metric, score="same", with_count=True)
    assert reward(completions=COMPLETIONS, answer=REFERENCES) == [1.0, 0.0, 1.0]


def test_several_results_need_a_score(metric):
    reward = evaluate_reward(metric, with_count=True)
    with pytest.raises(ValueError, match=r"score=None.*\['count', 'same'\].*Set `score`"):
        reward(completions=["a"], answer=["a"])


def test_unknown_score(metric):
    reward = evaluate_reward(metric, score="bleu")
    with pytest.raises(ValueError, match=r"score='bleu'.*\['same'\].*Set `score`"):
        reward(completions=["a"], answer=["a"])


def test_columns_of_another_length_are_an_error(metric):
    with pytest.raises(ValueError, match="zip"):
        evaluate_reward(metric)(completions=["a"], answer=["a", "b"])


def test_evaluate_is_imported_only_to_load_a_metric(metric, monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)  # importing it now raises ImportError
    evaluate_metric = importlib.reload(importlib.import_module("es_trainer.rewards.evaluate_metric"))
    assert evaluate_metric.evaluate_reward(metric).__name__ == "same_text"
    with pytest.raises(ImportError):
        evaluate_metric.evaluate_reward("same_text")


def test_all_completions_of_a_member_together(metric):
    reward = evaluate_reward(metric, scope="member", postprocess=str.lower)
    assert reward.reward_scope == "member"
    assert reward(completions=COMPLETIONS, answer=["paris", "paris", "Rome"]) == pytest.approx(2 / 3)
    each = evaluate_reward(metric, postprocess=str.lower)
    assert each(completions=COMPLETIONS, answer=["paris", "paris", "Rome"]) == [1.0, 1.0, 0.0]


def test_metrics_that_need_a_set_are_known(metric, tmp_path):
    assert evaluate_reward(metric).reward_scope == "completion"
    (tmp_path / "f1").mkdir()
    (tmp_path / "f1" / "f1.py").write_text(METRIC_SOURCE.replace("SameText", "F1"))
    assert evaluate_reward(str(tmp_path / "f1")).reward_scope == "member"


def test_an_unknown_scope(metric):
    with pytest.raises(ValueError, match="scope='population' is not valid: choose one of 'completion', 'member'"):
        evaluate_reward(metric, scope="population")
