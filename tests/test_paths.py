"""What can only be a local path is looked for before anything is loaded."""

import pytest

from es_trainer.paths import check_local


@pytest.mark.parametrize("name", ["./model", "~/nothing/here", "runs/brief/model", "rows.jsonl", "data/rows.parquet"])
def test_a_path_where_nothing_is(name):
    with pytest.raises(FileNotFoundError, match=f"`some_option='{name}'`: there is no such file or folder"):
        check_local("some_option", name)
    with pytest.raises(FileNotFoundError, match=f"`some_option='{name}'`: there is no such folder"):
        check_local("some_option", name, folder=True)


@pytest.mark.parametrize("name", [None, "gpt2", "user/model-0.5b", "user/data.v1", "tests"])
@pytest.mark.parametrize("folder", [False, True])
def test_what_may_be_on_the_hub_or_is_here(name, folder):
    check_local("some_option", name, folder)


def test_a_file_is_no_folder():
    check_local("some_option", __file__)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        check_local("some_option", __file__, folder=True)
