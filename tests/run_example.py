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


OF_ES = {"population_size": 4, "num_prompts_per_step": 2}


def main(script: str, length: str = "8") -> None:
    options = {**OPTIONS, "max_completion_length": int(length)}
    for config, of_kind in ((GRPOConfig, {}), (ESConfig, OF_ES)):
        configure = config.__init__
        config.__init__ = lambda self, *args, _configure=configure, _of_kind=of_kind, **kwargs: _configure(
            self, *args, **{**kwargs, **options, **_of_kind}
        )
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
