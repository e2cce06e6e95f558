"""The notebooks of examples/: in the form in which they are committed, and run with settings of a minute."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
SETTINGS = {
    "from_grpo.ipynb": {"grpo_steps": 1, "num_prompts": 4, "population_size": 16, "max_steps": 2},
    "quickstart.ipynb": {"population_size": 8, "num_prompts": 4, "max_steps": 2},
}


def test_all_of_them_are_run():
    assert list(SETTINGS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_has_no_outputs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}  # no version of a machine
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            compile(cell.source, f"{name}, cell {cell.id}", "exec")


@pytest.mark.parametrize("name", NAMES)
def test_the_files_that_it_links_to_are_there(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for part in texts.split("](")[1:] if not (link := part.split(")")[0]).startswith("http")]
    assert links and all((FOLDER / link).exists() for link in links)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    (position,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert {line.split(" = ")[0] for line in notebook.cells[position].source.splitlines()} == set(SETTINGS[name])
    settings = "\n".join(f"{setting} = {value}" for setting, value in SETTINGS[name].items())
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(settings))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    shown = {name: "".join(o.data["text/plain"] for o in some if "data" in o) for name, some in outputs.items()}
    if name == "quickstart.ipynb":
        assert shown["replay"] == "True"
        assert "What is the capital of Spain?" in shown["after"]
    else:
        assert "learning_rate: " in shown["probe"]
        assert "a step of GRPO" in shown["speed"] and "sigma_cost" in shown["learns"]
