"""A run is its base model and its history: what every update was made of, as JSON lines."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import auto_model
from ..adapters import add_adapter, from_json
from ..config import ESConfig
from ..evolution import EvolutionStrategy, Member
from ..evolution.optimizer import ReadInitialWeights, UpdateRecord
from ..fields import default, same_in
from ..noise import noise
from ..noise.shapes import SHAPES
from ..precision import kept_in_float32
from ..weights.layouts import EngineWeights, Quantized
from .history_file import HISTORY_NAME, History


logger = logging.get_logger(__name__)

T = TypeVar("T", bound=EvolutionStrategy)

# What a line says for its update to be done again. Those of earlier versions have no sigma: it was the config's
UPDATE = ("seeds", "signs", "utilities", "learning_rate", "sigma", "in_place")
STEP_SCALE = "step_scale"  # and this one with `auto_step`


def first_digest(header: dict[str, Any]) -> str:
    """What stands for a history that has no updates yet."""
    return _hash(json.dumps(header))


def agree(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether the lines of two histories, as far as both go, say the same of the updates."""
    return all(update_of(mine) == update_of(theirs) for mine, theirs in zip(lines, others, strict=False))


def extend_digest(digest: str, line: dict[str, Any]) -> str:
    """What stands for a history, given what stands for it without its last line."""
    return _hash(digest + json.dumps(update_of(line)))


def update_of(line: dict[str, Any]) -> dict[str, Any]:
    """What a line says for its update to be done again."""
    scale = {STEP_SCALE: line[STEP_SCALE]} if STEP_SCALE in line else {}
    return {key: line.get(key) for key in UPDATE} | scale


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def run_config(args: ESConfig) -> dict[str, Any]:
    """The fields of the config that make a run what it is."""
    return {name: getattr(args, name) for name in same_in(ESConfig, "run")}


def working_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a run computes in, or `None` for that in which the model is given."""
    return torch.bfloat16 if config["bf16"] else torch.float16 if config["fp16"] else None


def describe(optimizer: EvolutionStrategy, args: ESConfig) -> dict[str, Any]:
    """What a run is, apart from its base model and its updates: the first line of a history."""
    return {
        "noise_version": noise.VERSION,
        "device": args.device.type,  # the kernels of different kinds round differently
        "config": json.loads(json.dumps(run_config(args))),  # as a file says it, whose keys are text
        "parameters": {shard.name: list(shard.shape) for shard in optimizer.weights.shards},
        "decayed": [
            name for group in optimizer.param_groups if group["weight_decay"] > 0 for name in group["param_names"]
        ],
    }


def with_defaults(header: dict[str, Any]) -> dict[str, Any]:
    """The header of a run of an earlier version with the fields that it had not: their defaults change nothing."""
    defaults = {item.name: default(item) for item in fields(ESConfig) if item.name in same_in(ESConfig, "run")}
    return {**header, "config": defaults | header.get("config", {})}


def differences(header: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """How two runs differ, a sentence each; empty if one can go on from the other's checkpoint."""
    header = with_defaults(header)
    found = [_other_noise(header)] if _other_noise(header) else []
    found += [
        f"`{name}` is {other['config'][name]!r} but was {header['config'][name]!r}"
        for name in same_in(ESConfig, "run")
        if other["config"][name] != header["config"][name]
    ]
    mine, theirs = other["parameters"], header["parameters"]
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            found.append(
                f"the trained parameter `{name}` has shape {mine.get(name)} but had {theirs.get(name)} "
                "(None: it is not trained)"
            )
            break
    return found


def _other_noise(header: dict[str, Any]) -> str | None:
    version = header.get("noise_version", 1)
    if version == noise.VERSION:
        return None
    return (
        f"its noise has version {version}, but this version of es_trainer makes noise of version {noise.VERSION}: "
        "install the es_trainer that the run was made with"
    )


def trained_parameters(
    model: PreTrainedModel, header: dict[str, Any], source: str
) -> list[tuple[str, torch.nn.Parameter]]:
    """
    The parameters of a base model that a run trained.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model that the run started with.
        header (`dict[str, Any]`):
            The first line of the run's history.
        source (`str`):
            What errors call that.

    Raises:
        `ValueError`: If the run is of another model, or its noise cannot be made.
    """
    if _other_noise(header):
        raise ValueError(f"The {source} cannot be replayed: {_other_noise(header)}.")
    parameters = dict(model.named_parameters())
    for name, shape in header["parameters"].items():
        if name.startswith("base_model.model.") and not is_peft_model(model):
            raise ValueError(
                f"The {source} is of an adapter: it trained `{name}`. Give the `PeftModel` that the run started with, "
                "with the weights its adapter had then."
            )
        if name not in parameters or list(parameters[name].shape) != shape:
            raise ValueError(
                f"The {source} is of another model: it trained `{name}` of shape {shape}, which the base model "
                f"{'has in another shape' if name in parameters else 'does not have'}."
            )
    return [(name, parameters[name]) for name in header["parameters"]]


def start_checksum(optimizer: EvolutionStrategy) -> int | None:
    """A number for the weights that a run starts with, or `None` where this process has a part of them."""
    weights = optimizer.weights
    return None if weights.partitioned else sum(weights.checksums()) % (1 << 64)


def make_optimizer(
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    decayed: set[str],
    config: dict[str, Any],
    frozen: Iterable[torch.Tensor] = (),
    engine_weights: dict[torch.nn.Parameter, EngineWeights] | None = None,
    float32: Collection[str] = (),
    quantized: Mapping[torch.nn.Parameter, Quantized] | None = None,
    anchor_weights: Literal["device", "host"] | ReadInitialWeights = "device",
    kind: type[T] = EvolutionStrategy,
) -> T:
    """
    The optimizer of a run.

    Args:
        named_parameters (`list[tuple[str, nn.Parameter]]`):
            Parameters to train.
        decayed (`set[str]`):
            Names of those that `weight_decay` applies to.
        config (`dict[str, Any]`):
            What `run_config` returned.
        frozen (`Iterable[torch.Tensor]`, *optional*):
            The model's other parameters, and buffers.
        engine_weights (`dict[nn.Parameter, EngineWeights]`, *optional*):
            The weights that an inference engine has of the parameters.
        float32 (`Collection[str]`, *optional*):
            Names of parameters that are computed with in float32; what `kept_in_float32` returned.
        quantized (`Mapping[nn.Parameter, Quantized]`, *optional*):
            The layouts of parameters that are computed with from 8 bits.
        anchor_weights (`str` or `Callable`, *optional*, defaults to `"device"`):
            Where the initial weights are; see [`EvolutionStrategy`].
        kind (`type`, *optional*, defaults to `EvolutionStrategy`):
            Its class.
    """
    groups = [
        {"params": [(n, p) for n, p in named_parameters if n in decayed], "weight_decay": config["weight_decay"]},
        {"params": [(n, p) for n, p in named_parameters if n not in decayed], "weight_decay": 0.0},
    ]
    return kind(
        [group for group in groups if group["params"]],
        lr=float(config["learning_rate"]),  # also if it was given in units of sigma
        sigma=config["sigma"],
        population_size=config["population_size"],
        antithetic=config["antithetic"],
        num_steps_per_population=config["num_steps_per_population"],
        fitness_shaping=config["fitness_shaping"],
        rule=config["es_optimizer"],
        betas=(config["adam_beta1"], config["adam_beta2"]),
        eps=config["adam_epsilon"],
        anchor_decay=config["anchor_decay"],
        anchor_penalty=config["anchor_penalty"],
        anchor_weights=anchor_weights,
        master_weights=config["master_weights"],
        dtype=working_dtype(config),
        seed=config["seed"],
        perturbation=SHAPES[config["perturbation"]](config["perturbation_rank"]),
        frozen=frozen,
        engine_weights=engine_weights,
        float32=float32,
        quantized=quantized,
    )


def replay(
    base_model: str | PreTrainedModel,
    history: str | Path,
    steps: int | None = None,
    scale: float = 1.0,
    average: int = 1,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """
    Rebuild the trained weights from the model that a run started with and the run's history.

    Args:
        base_model (`str` or [`~transformers.PreTrainedModel`]):
            The model that the run started with, in the dtype it was given in then. A string is loaded as
            [`ESTrainer`] loads it (in float32 unless `dtype` says otherwise), on a GPU if the run was on one and
            there is one; an object is changed in place, where it is. If the trainer was given a `peft_config`, the
            adapter is added as it did. If it was given a [`~peft.PeftModel`], give one with the adapter's weights from
            before training.
        history (`str` or `Path`):
            The run's `history.jsonl`, or the folder it is in.
        steps (`int`, *optional*):
            Number of updates to replay. `None` replays all.
        scale (`float`, *optional*, defaults to `1.0`):
            Length of the updates, as a multiple of what they were. Members are not evaluated anew: this is another
            model than that of a run with another learning rate.
        average (`int`, *optional*, defaults to `1`):
            The weights are the mean of those after each of so many last updates, as in stochastic weight averaging
            ([paper](https://huggingface.co/papers/1803.05407)).
        model_init_kwargs:
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`].

    Returns:
        [`~transformers.PreTrainedModel`]: The model with the weights after the last update, bit-identical to those
        of the run on the same kind of device (on another, the same up to the rounding of float32, which is warned of),
        in the dtype it was given in; with `scale` or `average`, what these make of them.

    Raises:
        `ValueError`: If the history is of another model, other initial weights or another version of the noise, or has
            fewer updates than `steps` or `average`.
    """
    header, lines = read_history(history, steps)
    if not 1 <= average <= max(len(lines), 1):
        raise ValueError(
            f"`average={average}` is not valid: {len(lines)} updates are replayed; give one of 1 to that."
        )
    base_model, optimizer = begin_replay(base_model, history, header, **model_init_kwargs)
    _replay(optimizer, lines, scale, average)
    end_replay(optimizer)
    return base_model


def read_history(history: str | Path, steps: int | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    What describes a run, and the lines of its first updates.

    Args:
        history (`str` or `Path`):
            The run's `history.jsonl`, or the folder it is in.
        steps (`int`, *optional*):
            Number of updates. `None` for all.

    Raises:
        `ValueError`: If there are fewer.
    """
    path = Path(history)
    header, lines = History(path / HISTORY_NAME if path.is_dir() else path).read()
    if steps is not None and steps > len(lines):
        raise ValueError(f"`steps={steps}`: the history {path} has {len(lines)} updates.")
    return with_defaults(header), lines[:steps]


def begin_replay(
    base_model: str | PreTrainedModel, history: str | Path, header: dict[str, Any], **model_init_kwargs: Any
) -> tuple[PreTrainedModel, EvolutionStrategy]:
    """The model that a run started with, and an optimizer of its weights. Arguments and errors are `replay`'s."""
    if isinstance(base_model, str):
        on_gpu = header.get("device") == "cuda" and torch.cuda.is_available()
        options = {"dtype": torch.float32, "device_map": "cuda" if on_gpu else None, **model_init_kwargs}
        base_model = auto_model.from_pretrained(base_model, **options)
    device = base_model.device.type
    if header.get("device", device) != device:
        logger.warning(
            f"The run was on {header['device']!r} and is replayed on {device!r}, whose noise is the same up to the "
            "rounding of float32. So are the weights; replay on the same kind of device for the same bits."
        )
    if header.get("peft_config") is not None and not is_peft_model(base_model):
        base_model = add_adapter(base_model, from_json(header["peft_config"]), header["config"]["seed"])
    trained = trained_parameters(base_model, header, f"history {history}")
    float32 = kept_in_float32(base_model, working_dtype(header["config"]))
    optimizer = make_optimizer(trained, set(header["decayed"]), header["config"], float32=float32)
    if header.get("start") not in (None, start_checksum(optimizer)):
        raise ValueError(
            f"The history {history} started with other weights than the base model has. Give the model that the run "
            "started with, in the dtype it was loaded in; of an adapter, the `PeftModel` with its initial weights."
        )
    return base_model, optimizer


def end_replay(optimizer: EvolutionStrategy) -> None:
    """Let the model have the trained weights for good, in the dtype in which they were given."""
    trained = [shard.parameter for shard in optimizer.weights.shards]
    with optimizer.weights.in_checkpoint_dtype():
        # The model keeps what the parameters hold here
        trained_data = [parameter.data for parameter in trained]
    for parameter, data in zip(trained, trained_data, strict=True):
        parameter.data = data


def _replay(optimizer: EvolutionStrategy, lines: list[dict[str, Any]], scale: float, average: int) -> None:
    """Do the updates of the lines, and average the weights after the last of them, if that is more than one."""
    first = len(lines) - average if average > 1 else len(lines)  # to be averaged
    for line in lines[:first]:
        replay_step(optimizer, line, scale)
    if first == len(lines):
        return
    sums = [torch.zeros_like(shard.trained, dtype=torch.float32) for shard in optimizer.weights.shards]
    for line in lines[first:]:
        replay_step(optimizer, line, scale)
        for total, shard in zip(sums, optimizer.weights.shards, strict=True):
            total.add_(shard.trained)
    for total, shard in zip(sums, optimizer.weights.shards, strict=True):
        shard.trained.copy_(total / average)
    optimizer.weights.refresh()


def replay_step(optimizer: EvolutionStrategy, line: dict[str, Any], scale: float = 1.0) -> None:
    """Do the update of a line of the history, of `scale` times its length."""
    for group in optimizer.param_groups:
        group["lr"] = scale * line["learning_rate"]
    tell_again(optimizer, line)
    optimizer.step()


def tell_again(optimizer: EvolutionStrategy, line: dict[str, Any]) -> None:
    """Tell the optimizer what a line of the history says, and do to the weights what evaluating the members did."""
    optimizer.update_record = UpdateRecord.of_line(line)
    optimizer.sigma = line.get("sigma", optimizer.sigma)
    optimizer.step_scale = line.get(STEP_SCALE, 1.0)
    if optimizer.weights.drifts and line["in_place"]:
        # Every evaluation left its rounding error in the weights
        for seed, sign in zip(line["seeds"], line["signs"], strict=True):
            optimizer.perturb(Member(seed, sign))
