"""Names that can only be local paths."""

from pathlib import Path


FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".yaml", ".yml"}


def check_local(name: str, value: str | None, folder: bool = False) -> None:
    """
    Look for what a field names, if it can only be a local path. What could be the name of a repository on the Hub is
    left to the Hub.

    Args:
        name (`str`):
            The field.
        value (`str`, *optional*):
            What it was given.
        folder (`bool`, *optional*, defaults to `False`):
            Whether a file will not do, as with models.

    Raises:
        `FileNotFoundError`: If there is nothing there.
    """
    if value is None:
        return
    path = Path(value).expanduser()
    if path.is_dir() or (path.exists() and not folder):
        return
    if value.startswith((".", "/", "~")) or value.count("/") > 1 or path.suffix in FILE_SUFFIXES:
        raise FileNotFoundError(f"`{name}={value!r}`: there is no such {'folder' if folder else 'file or folder'}.")
