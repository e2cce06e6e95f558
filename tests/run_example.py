"""Runs an example as it is, but with options for a tiny run: `run_example.py SCRIPT [LENGTH]`."""

import runpy
import sys

from trl import GRPOConfig

from es_trainer import ESConfig


OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 2,
    "eval_strategy": "no",
    "report_to": "none",
}


def main(script: str, length: str = "8") -> None:
    options = {**OPTIONS, "max_completion_length": int(length)}
    for config in (GRPOConfig, ESConfig):
        configure = config.__init__
        config.__init__ = lambda self, *args, _configure=configure, **kwargs: _configure(
            self, *args, **{**kwargs, **options}
        )
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
