"""Options on the command line and in YAML files."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import TrlParser

from ..choices import OF_SIGMA
from ..paths import check_local
from .mistakes import suggestion
from .recipes import with_files
from .trust import code_in


if TYPE_CHECKING:
    from ..config import ESConfig


TRUST = "trust_remote_code"


class Parser(TrlParser):
    """
    A [`~trl.TrlParser`] that refuses unknown names, before anything is made of the known ones, and suggests the
    nearest.

    Args:
        dataclass_types (`type` or `Iterable[type]`):
            Dataclasses whose fields are the options.
        prog (`str`, *optional*):
            Name of the program in messages.
        launched (`bool`, *optional*, defaults to `False`):
            Whether options of `accelerate launch` may stand among the others. They are left over.
        **kwargs:
            Passed on to [`~trl.TrlParser`].
    """

    def __init__(
        self, dataclass_types: type | Iterable[type], prog: str | None = None, launched: bool = False, **kwargs: Any
    ):
        epilog = (
            "Options can also stand in a YAML file, given by --config FILE, or by --recipe NAME if it comes with this "
            "package. The command line overrides it."
        )
        super().__init__(dataclass_types, prog=prog, allow_abbrev=False, epilog=epilog, **kwargs)
        for action in self._actions:
            if action.dest == "learning_rate":
                action.type = _number_or_multiple_of_sigma
        self._in_yaml: dict[str, Any] = {}
        self.left_over: set[str] = set()
        if launched:
            from .launch import accelerate_configs, launch_options

            self.left_over = launch_options()
            self.epilog += (
                " Options of `accelerate launch` are passed on to it, such as --num_processes; --accelerate_config "
                f"gives it a file or one of these: {', '.join(accelerate_configs())}."
            )

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """
        See [`~trl.TrlParser.parse_args_and_config`]. `--config=FILE` is the same as `--config FILE`, and
        `--recipe NAME` is `--config` with the file of a recipe.
        """
        args = with_files(sys.argv[1:] if args is None else args)
        if args.count("--config") > 1:
            self.error(
                "`--config` or `--recipe` is given twice: put all options into one file, or some on the command line."
            )
        parsed = super().parse_args_and_config(args, **kwargs)
        given = {arg.removeprefix("--").split("=")[0] for arg in args if arg.startswith("--")}
        trusted = any(getattr(options, TRUST, False) for options in parsed) and TRUST in given
        found = code_in({name: value for name, value in self._in_yaml.items() if name not in given})
        if found and not trusted:
            self.error(
                f"`{found[0]}` in the YAML file has {found[1]!r}, and a file does not run code by itself. If you know "
                f"the code, give --{TRUST}, or --{found[0]} on the command line."
            )
        return parsed

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """See [`~trl.TrlParser.set_defaults_with_config`]."""
        self._in_yaml = kwargs
        remaining = super().set_defaults_with_config(**kwargs)
        self._refuse_unknown([option.removeprefix("--") for option in remaining[::2]], "YAML key")
        return remaining

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        namespace, remaining = super().parse_known_args(args, namespace)
        # With `accelerate launch` in between, what does not start with a dash may be the value of an option of it
        self._refuse_unknown([arg for arg in remaining if arg.startswith("--") or not self.left_over], "option")
        return namespace, remaining

    def _refuse_unknown(self, names: list[str], kind: str) -> None:
        known = {option.lstrip("-") for option in (*self._option_string_actions, *self.left_over)} | {
            "config",
            "recipe",
        }
        for name in names:
            name = name.split("=")[0]
            bare = name.lstrip("-")
            if f"--{bare}" not in self.left_over:
                self.error(f"unknown {kind} {name!r}{suggestion(bare, known, name.removesuffix(bare))}")

    def error(self, message: str) -> None:
        """End with the message alone: the usage of some hundred options would hide it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _number_or_multiple_of_sigma(text: str) -> float | str:
    return text if OF_SIGMA.fullmatch(text.strip()) else float(text)


@dataclass
class RewardArguments:
    """
    Arguments about what completions are for.

    Args:
        task (`str`, *optional*):
            A task of `es_trainer.tasks`, which brings datasets and reward functions along: such as `"countdown"`, or
            `"reasoning_gym:mini_sudoku"` with a generator of reasoning-gym. If the task's rows come from a dataset,
            `dataset_name` and `dataset_config` choose another.
        reward_funcs (`list[str]`, *optional*):
            Reward functions. If `None`, those of the task. Supported values are:

            - names of `es_trainer.rewards`, such as `"countdown_reward"`
            - of `trl.rewards`, if `es_trainer.rewards` does not have them: `"accuracy_reward"`,
              `"reasoning_accuracy_reward"`, `"think_format_reward"` and `"get_soft_overlong_punishment"` (used values
              are `max_completion_len=1280`, `soft_punish_cache=256`)
            - `"evaluate:exact_match"`: a metric of the `evaluate` library, by name or path, against the column
              `answer`; `"evaluate:rouge:rougeL"` picks one of several scores, and
              `"evaluate:f1,average=macro,reference_column=label,postprocess=my_lib.to_label"` has arguments of
              [`~rewards.evaluate_reward`] and of the metric
            - any dotted import path, such as `"my_lib.rewards.custom_reward"`; in a YAML file only beside
              `--trust_remote_code` on the command line
        reward_model_name_or_path (`str`, *optional*):
            Reward model: name, or folder, of a model for sequence classification.
        agent (`str`, *optional*):
            Dotted path of a function `agent(example, endpoint)`, a program that asks the model for completions and
            returns the reward, such as `"my_agent.solve"`. Rows need no prompt then, and rewards may be left out.
    """

    task: str | None = field(
        default=None,
        metadata={
            "help": "A task of es_trainer.tasks, such as countdown, or reasoning_gym:NAME with a generator of "
            "reasoning-gym. It brings datasets and reward functions along."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names of es_trainer.rewards and trl.rewards, `evaluate:metric` or "
            "`evaluate:metric:score`, or dotted import paths. If `None`, those of the task."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model: name, or folder, of a model for sequence classification."}
    )

    agent: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a function `agent(example, endpoint)`, a program that asks the model for "
            "completions and returns the reward, such as my_agent.solve."
        },
    )

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):  # YAML without brackets
            self.reward_funcs = [self.reward_funcs]


@dataclass
class GenerationArguments:
    """
    Arguments about models and how they generate.

    Args:
        model_name_or_path (`str`):
            Model: a name, or the folder of a model, checkpoint or PEFT adapter.
        compare_to (`str`, *optional*):
            Model to compare with, such as the one that training started from.
        model_revision (`str`, *optional*, defaults to `"main"`):
            Version of models on the Hub: a branch, tag or commit.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the weights: `"auto"` (as they were saved), `"bfloat16"`, `"float16"` or `"float32"`.
        attn_implementation (`str`, *optional*):
            Which attention implementation to use.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow models and tokenizers that are defined by code in their own repository.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to use the CPU where there is a GPU.
        batch_size (`int`, *optional*, defaults to `32`):
            Most completions generated at once.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Maximum length of a completion, in tokens.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature for sampling; `0.0` is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Cumulative probability of the top tokens to consider when sampling.
        top_k (`int`, *optional*, defaults to `0`):
            Number of highest probability tokens to keep when sampling. `0` keeps all.
        min_p (`float`, *optional*):
            Minimum token probability when sampling, scaled by the probability of the most likely token.
        generation_kwargs (`str` or `dict[str, Any]`, *optional*):
            Additional keyword arguments of [`~transformers.GenerationConfig`], as JSON on the command line.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples. Models that are compared share their random numbers, and the batch size has no part
            in them.
        system_prompt (`str`, *optional*):
            System message for every prompt, in place of the one it may have. It is put before prompts that are text.
        chat_template_kwargs (`str` or `dict[str, Any]`, *optional*):
            Additional keyword arguments of `apply_chat_template`, as JSON on the command line.
    """

    model_name_or_path: str = field(
        metadata={"help": "Model: a name, or the folder of a model, checkpoint or PEFT adapter."}
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "Model to compare with, such as the one that training started from."}
    )
    model_revision: str = field(default="main", metadata={"help": "Version of models on the Hub."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Dtype of the weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Which attention implementation to use."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to allow models and tokenizers defined by code in their repository."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to use the CPU where there is a GPU."})
    batch_size: int = field(default=32, metadata={"help": "Most completions generated at once."})
    max_completion_length: int = field(default=512, metadata={"help": "Maximum length of a completion, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature for sampling; 0.0 is greedy decoding."})
    top_p: float = field(
        default=1.0, metadata={"help": "Cumulative probability of the top tokens to consider when sampling."}
    )
    top_k: int = field(
        default=0, metadata={"help": "Number of highest probability tokens to keep when sampling. `0` keeps all."}
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Minimum token probability when sampling, scaled by the probability of the most likely token."
        },
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Additional keyword arguments of `GenerationConfig`, as JSON."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples, which models share."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message for every prompt, in place of the one it may have."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Additional keyword arguments of `apply_chat_template`, as JSON."}
    )

    @property
    def models(self) -> list[str]:
        """The model to compare with, if there is one, and the model."""
        return [name for name in (self.compare_to, self.model_name_or_path) if name is not None]

    def to_config(self) -> "ESConfig":
        """
        The configuration of a trainer that generates like this.

        Raises:
            `ValueError`: If a value is not valid.
            `FileNotFoundError`: If a model's folder does not exist.
        """
        from ..config import ESConfig

        for option in ("model_name_or_path", "compare_to"):
            check_local(option, getattr(self, option), folder=True)
        if self.batch_size < 1:
            raise ValueError(f"`batch_size={self.batch_size}` is not valid: it must be at least 1.")
        same = "trust_remote_code use_cpu max_completion_length temperature top_p top_k min_p generation_kwargs seed"
        return ESConfig(
            report_to="none",
            bf16=False,
            model_init_kwargs={
                "dtype": self.dtype,
                "revision": self.model_revision,
                "attn_implementation": self.attn_implementation,
            },
            chat_template_kwargs=self.chat_template_kwargs,
            generation_batch_size=self.batch_size,
            **{name: getattr(self, name) for name in same.split()},
        )
