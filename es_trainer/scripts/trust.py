"""What a YAML file may ask for by itself: it may be somebody else's, and must not run code that nobody looked at."""

from typing import Any

from .metric_names import PREFIX, MetricName


def code_in(options: dict[str, Any]) -> tuple[str, str] | None:
    """
    The first option of a YAML file that would run other code than that of this package, TRL and the metrics of
    `evaluate`, and what it names.

    Args:
        options (`dict[str, Any]`):
            The options that the file has, and the command line has not.
    """
    for option in ("reward_funcs", "agent", "majority_key"):
        value = options.get(option) or []
        for name in [value] if isinstance(value, str) else value:
            if _is_code(str(name)):
                return option, str(name)
    if options.get("trust_remote_code"):
        return "trust_remote_code", str(options["trust_remote_code"])
    for option in ("model_init_kwargs", "generation_kwargs"):
        for setting in ("trust_remote_code", "custom_generate"):
            if setting in str(options.get(option)):
                return option, setting
    return None


def _is_code(name: str) -> bool:
    return MetricName.parse(name).runs_other_code() if name.startswith(PREFIX) else "." in name
