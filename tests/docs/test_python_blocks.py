"""Python in README.md and docs/*.md runs, page by page, on tiny models; what cannot run is checked."""

import ast
import importlib
import inspect
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_model
from pages import BLOCKS, PAGES, Block
from tiny_vision import make_tiny

import es_trainer.smollm2
from es_trainer import ESConfig, ESTrainer


sys.path.append(str(Path(__file__).parents[1] / "agents"))

from calling import calling_tokenizer, needs_tools  # noqa: E402


SHORT = {
    "use_cpu": True,
    "bf16": False,
    "population_size": 4,
    "num_prompts_per_step": 2,
    "max_completion_length": 8,
    "max_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
UNLESS_SET = {"save_strategy": "no", "evaluate_center": False}
# What pages need that a test does not have. Each of these blocks says why
NOT_RUN = {"agents.md": 1, "hub.md": 1, "rewards.md": 1, "vllm.md": 3}
PYTHON = [block for block in BLOCKS if block.language == "python"]
RUN = dict.fromkeys(block.page for block in PYTHON if block.not_run is None)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models, by the names that pages have."""
    text = tmp_path_factory.mktemp("text")
    tokenizer = calling_tokenizer()
    make_model(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(text)
    tokenizer.save_pretrained(text)
    names = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
    return dict.fromkeys(names, str(text))


@pytest.fixture(scope="module")
def models_of_vision(tmp_path_factory) -> dict[str, str]:
    """The same for models that read images."""
    folder = tmp_path_factory.mktemp("vision")
    for part in make_tiny("gemma3"):
        part.save_pretrained(folder)
    return {"Qwen/Qwen2.5-VL-3B-Instruct": str(folder)}


@pytest.fixture
def short_runs(tmp_path, monkeypatch, models):
    """In a folder of its own, whatever a page trains is tiny."""
    configure = ESConfig.__init__
    monkeypatch.setattr(
        ESConfig,
        "__init__",
        lambda self, *args, **options: configure(self, *args, **{**UNLESS_SET, **options, **SHORT}),
    )
    monkeypatch.setattr(es_trainer.smollm2, "smollm2", lambda: models["HuggingFaceTB/SmolLM2-135M-Instruct"])
    monkeypatch.chdir(tmp_path)


def run(block: Block, models: dict[str, str], namespace: dict[str, object]) -> None:
    code = block.code
    for name, folder in models.items():
        code = code.replace(f'"{name}"', f'"{folder}"')
    exec(block.before, namespace)
    # As many empty lines before it as in the page, so that tracebacks show the right one
    exec(compile("\n" * (block.line - 1) + code, PAGES[block.page], "exec"), namespace)


@pytest.mark.parametrize("page", [pytest.param(page, marks=[needs_tools] * (page == "agents.md")) for page in RUN])
def test_page_runs(short_runs, models, request, page):
    if page == "images.md":
        models = request.getfixturevalue("models_of_vision")
    namespace = {"__name__": "__main__"}
    for block in PYTHON:
        if block.page == page and block.not_run is None:
            run(block, models, namespace)


@pytest.mark.parametrize("block", [b for b in PYTHON if b.not_run], ids=lambda block: f"{block.page}:{block.line}")
def test_what_is_not_run_has_the_right_names(block):
    tree = ast.parse(block.code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("ESConfig", "ESTrainer"):
            known = inspect.signature({"ESConfig": ESConfig, "ESTrainer": ESTrainer}[node.func.id]).parameters
            assert {keyword.arg for keyword in node.keywords} <= known.keys()
            if node.func.id == "ESConfig":
                options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
                ESConfig(*map(ast.literal_eval, node.args), **options)


def test_what_is_not_run_is_counted():
    assert Counter(block.page for block in PYTHON if block.not_run) == NOT_RUN
