"""Fine-tune all weights of language models with evolution strategies, in the style of TRL."""

from typing import TYPE_CHECKING

from .version import __version__


if TYPE_CHECKING:
    from .config import ESConfig
    from .run.history import replay
    from .run.top_members import replay_top_members
    from .trainer import ESTrainer

__all__ = ["ESConfig", "ESTrainer", "__version__", "replay", "replay_top_members"]

_MODULES = {
    "ESConfig": "config",
    "ESTrainer": "trainer",
    "replay": "run.history",
    "replay_top_members": "run.top_members",
}


def __getattr__(name: str):
    # Nothing heavy is imported until it is used
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
