"""`es-trainer replay`"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..paths import check_local
from ..scripts.arguments import Parser


@dataclass
class ReplayArguments:
    """
    Arguments of `es-trainer replay`.

    Args:
        model_name_or_path (`str`):
            The model that the run started with.
        history (`str`):
            The run's `history.jsonl`, or the folder it is in.
        output_dir (`str`):
            Folder for the trained model and its tokenizer.
        steps (`int`, *optional*):
            Number of updates to replay. If `None`, all.
        top_members (`int`, *optional*):
            Save the model before the last of these updates, and so many of that update's members, those with the
            highest rewards, as LoRA adapters of it: `member-1`, ... in the folder.
        scale (`float`, *optional*, defaults to `1.0`):
            Length of the updates, as a multiple of what they were.
        average (`str`, *optional*):
            `"last:10"` gives the mean of the weights after each of the last 10 updates.
        model_revision (`str`, *optional*, defaults to `"main"`):
            Version of the model on the Hub: a branch, tag or commit.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype that the run loaded the model in.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow models and tokenizers that are defined by code in their own repository.
    """

    model_name_or_path: str = field(metadata={"help": "The model that the run started with."})
    history: str = field(metadata={"help": "The run's history.jsonl, or the folder it is in."})
    output_dir: str = field(metadata={"help": "Folder for the trained model and its tokenizer."})
    steps: int | None = field(default=None, metadata={"help": "Number of updates to replay. If `None`, all."})
    top_members: int | None = field(
        default=None,
        metadata={
            "help": "Save the model before the last update, and so many of that update's members, those with the "
            "highest rewards, as LoRA adapters of it: member-1, ... in the folder."
        },
    )
    scale: float = field(default=1.0, metadata={"help": "Length of the updates, as a multiple of what they were."})
    average: str | None = field(
        default=None, metadata={"help": "last:K gives the mean of the weights after each of the last K updates."}
    )
    model_revision: str = field(default="main", metadata={"help": "Version of the model on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype that the run loaded the model in.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to allow models and tokenizers defined by code in their repository."}
    )

    def __post_init__(self):
        if self.top_members is not None and (self.scale != 1.0 or self.average is not None):
            raise ValueError(
                f"`top_members={self.top_members}` is given together with `scale` or `average`: members were made of "
                "the weights as they were. Leave these out."
            )

    @property
    def averaged(self) -> int:
        """
        Over how many updates to average.

        Raises:
            `ValueError`: If `average` is not `"last:K"`.
        """
        found = re.fullmatch("last:([1-9][0-9]*)", self.average or "last:1")
        if found is None:
            raise ValueError(f"`average={self.average!r}` is not valid: give a number of updates like 'last:10'.")
        return int(found[1])


def main(argv: list[str]) -> None:
    """Replay a run and save the model."""
    (arguments,) = Parser(ReplayArguments, prog="es-trainer replay").parse_args_and_config(argv)
    averaged = arguments.averaged
    check_local("model_name_or_path", arguments.model_name_or_path, folder=True)
    from .. import replay, replay_top_members
    from ..loading import load_processing_class
    from ..run.top_members import member_folders

    origin = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    run = arguments.model_name_or_path, arguments.history
    options = {"steps": arguments.steps, "dtype": arguments.dtype, **origin}
    folders = [Path(arguments.output_dir)]
    if arguments.top_members is None:
        model = replay(*run, scale=arguments.scale, average=averaged, **options)
        model.save_pretrained(arguments.output_dir)
    else:
        replay_top_members(*run, arguments.top_members, arguments.output_dir, **options)
        folders += member_folders(arguments.output_dir)
    processing_class = load_processing_class(arguments.model_name_or_path, origin)
    for folder in folders:
        processing_class.save_pretrained(folder)
    print(f"💾 Model saved to {arguments.output_dir}.")
    if arguments.top_members is not None:
        print(f"   The best members of the last update, the best first: {', '.join(map(str, folders[1:]))}.")
