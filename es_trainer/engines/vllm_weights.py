"""Where vLLM keeps the weights of a model: every parameter of the Transformers model as a view of the engine's own.

vLLM fuses projections, pads vocabularies and shards over tensor-parallel ranks. What a parameter is called, its shape
and its noise are those of Transformers, so that an engine and a plain model get the same perturbations.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..weights.layouts import EngineWeights
from ..weights.part import Part
from .live_weights import Logprobs, find_unused_weights, find_weights_without_effect


# Stacked experts of Transformers, as the parameters that hold them in vLLM
EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}

# Parts of names in Transformers, and in vLLM: Mixtral's layers, and towers of CLIP and SigLIP
RENAMED = ((".mlp.", ".block_sparse_moe."), ("vision_tower.", "vision_tower.vision_model."))
WRAPPED = ".base_layer"  # what a module that LoRA has wrapped is called in its wrapper


class LoadError(RuntimeError):
    """The engine does not have the weights of the model in a form that can be perturbed."""


def find_engine_weights(
    engine: nn.Module,
    parameters: Mapping[str, torch.Size],
    tp_rank: int = 0,
    tp_size: int = 1,
    dispensable: Container[str] = (),
) -> dict[str, EngineWeights]:
    """
    Find every parameter of a Transformers model in vLLM's model.

    Args:
        engine (`nn.Module`):
            The model of a vLLM worker.
        parameters (`Mapping[str, torch.Size]`):
            Names and shapes of the parameters in Transformers.
        tp_rank (`int`, *optional*, defaults to `0`):
            Rank of the worker in its tensor-parallel group.
        tp_size (`int`, *optional*, defaults to `1`):
            Size of the group.
        dispensable (`Container[str]`, *optional*):
            Names of those that vLLM's model need not have.

    Returns:
        `dict[str, EngineWeights]`: The weights of each that it has.

    Raises:
        [`LoadError`]: If a parameter is missing or has another shape, or the engine has weights that belong to none;
            names them.
    """
    modules, held = _modules_and_parameters(engine)
    covered = dict.fromkeys(held, 0)
    all_found, problems = {}, []
    for name, shape in parameters.items():
        found = _find(name, engine, modules, held)
        if found is None:
            if name not in dispensable:
                problems.append(f"{name} is missing")
            continue
        holder, tensor = found
        own = _weights_of(name, shape, tensor, modules[holder.rpartition(".")[0]], tp_rank, tp_size)
        if own is None:
            problems.append(f"{name} has shape {list(shape)}, but {list(tensor.shape)} in {holder}")
            continue
        all_found[name] = own
        covered[holder] += own.part.numel
    # Padding of the vocabulary is no weight
    strange = [
        f"{name} has {tensor.numel() - covered[name]} weights that belong to no parameter of the model"
        for name, tensor in held.items()
        if covered[name] < tensor.numel() - _padding(modules[name.rpartition(".")[0]], tensor)
    ]
    if problems or strange:
        raise load_error(problems + strange)
    return all_found


def check_values(engine_weights: Mapping[str, EngineWeights], parameters: Mapping[str, torch.Tensor]) -> None:
    """
    Compare the engine's weights with those of the model, bit for bit: fused weights may lie in another order.

    Args:
        engine_weights (`Mapping[str, EngineWeights]`):
            What `find_engine_weights` returned.
        parameters (`Mapping[str, torch.Tensor]`):
            The parameters in Transformers, whole, in any dtype.

    Raises:
        [`LoadError`]: If they differ; names the parameters.
    """
    refuse_other_values(
        [name for name, own in engine_weights.items() if not has_values(own, own.part.of(parameters[name]))]
    )


def has_values(own: EngineWeights, values: torch.Tensor) -> bool:
    """Whether the engine's weights are the flat values of their part, rounded to their dtype."""
    return torch.equal(values.to(own.weights), own.weights)


def refuse_other_values(names: Sequence[str]) -> None:
    """
    Raises:
        [`LoadError`]: If there are parameters whose values are not the model's.
    """
    if names:
        raise load_error([f"{name} has other values than the model's" for name in names])


def require_used_weights(
    names: Sequence[str],
    overwritten: Callable[[str], AbstractContextManager[None]],
    logprobs: Logprobs,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    where: str = "",
) -> None:
    """
    Args:
        where (`str`, *optional*, defaults to `""`):
            What each problem begins with. The rest is as with [`find_unused_weights`].

    Raises:
        [`LoadError`]: If the engine does not compute with a weight.
    """
    _refuse(find_unused_weights(names, overwritten, logprobs, tokenizer, context), where)


def require_seen_weights(
    names: Sequence[str],
    overwritten: Callable[[str], AbstractContextManager[None]],
    logprobs: Callable[[], list[float]],
) -> None:
    """
    Args:
        names (`Sequence[str]`):
            Names of parameters that only prompts with images depend on.
        overwritten (`Callable[[str], AbstractContextManager[None]]`):
            As with [`find_unused_weights`].
        logprobs (`Callable[[], list[float]]`):
            The highest log probabilities of the token after a prompt with images.

    Raises:
        [`LoadError`]: If the engine does not compute with a weight.
    """
    _refuse(find_weights_without_effect(names, overwritten, lambda: {"prompts with images": logprobs()}))


def _refuse(problems: Sequence[str], where: str = "") -> None:
    if problems:
        raise load_error([where + problem for problem in problems])


def load_error(problems: Sequence[str]) -> LoadError:
    """The error for what is wrong with the engine's weights, a sentence each."""
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return LoadError(
        f"vLLM does not hold the model's weights as they are: {'; '.join(problems[:4])}{more}. Perturbing what is "
        "there would leave parts of the model as they were. Use another `vllm_model_impl`, an unquantized model, or "
        "use_vllm=False."
    )


def _modules_and_parameters(engine: nn.Module) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    """Those of the engine by the names that they have without LoRA."""
    modules = {name.replace(WRAPPED, ""): module for name, module in engine.named_modules()}
    return modules, {name.replace(WRAPPED, ""): parameter for name, parameter in engine.named_parameters()}


def _find(
    name: str, engine: nn.Module, modules: dict[str, nn.Module], held: dict[str, torch.Tensor]
) -> tuple[str, torch.Tensor] | None:
    """The engine's parameter that holds a parameter of Transformers, and what of it is that."""
    for known in _known_names(name, engine):
        for holder in (known, *_experts(known)):
            if holder in held:
                return holder, held[holder].data
        holder = _fused_name(known, engine)
        if holder in held:
            module, projection = holder.rpartition(".")[0], known.split(".")[-2]
            parts = engine.packed_modules_mapping[module.rpartition(".")[2]]
            sizes, tensor = modules[module].output_partition_sizes, held[holder].data
            if sum(sizes) != len(tensor):  # packed away
                return holder, tensor
            return holder, tensor.split(sizes)[parts.index(projection)]
    return None


def engine_names(name: str, engine: nn.Module) -> list[str]:
    """Names that vLLM may have for a parameter of Transformers, or for the one that it is fused into."""
    return [
        each
        for known in _known_names(name, engine)
        for each in (known, _fused_name(known, engine))
        if each is not None
    ]


def _known_names(name: str, engine: nn.Module) -> list[str]:
    """Names that vLLM may have for a parameter of Transformers which it does not fuse."""
    names = [name]
    if hasattr(engine, "hf_to_vllm_mapper"):
        names += engine.hf_to_vllm_mapper.apply_list([name])
    return list(dict.fromkeys([*names, *(each.replace(*parts) for each in names for parts in RENAMED)]))


def _experts(name: str) -> list[str]:
    """Names of parameters of vLLM that hold stacked experts of Transformers."""
    module, _, kind = name.rpartition(".")
    return [f"{module}.{EXPERTS[kind]}", f"{module}.routed_experts.{EXPERTS[kind]}"] if kind in EXPERTS else []


def _fused_name(name: str, engine: nn.Module) -> str | None:
    """The name of the parameter that a projection is fused into."""
    module, _, kind = name.rpartition(".")
    parent, _, projection = module.rpartition(".")
    for whole, parts in engine.packed_modules_mapping.items():
        if projection in parts:
            return f"{parent}.{whole}.{kind}"
    return None


def _weights_of(
    name: str, shape: torch.Size, tensor: torch.Tensor, module: nn.Module, tp_rank: int, tp_size: int
) -> EngineWeights | None:
    """The weights of a parameter of that shape in a tensor of the engine, or `None` if they do not lie there."""
    if not tensor.is_contiguous() or tensor.dim() != len(shape):
        return None
    vocabulary = getattr(module, "shard_indices", None)
    if vocabulary is not None and tensor.shape[1:] == shape[1:] and module.org_vocab_size == shape[0]:
        start, stop = vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index
        weights = tensor[: stop - start].view(-1)  # without the padding
        return EngineWeights(Part.piece(name, shape, start * shape[1:].numel(), weights.numel()), weights)
    part = _part_of(name, shape, tensor.shape, tp_rank, tp_size)
    return None if part is None else EngineWeights(part, tensor.view(-1))


def _part_of(name: str, shape: torch.Size, own: torch.Size, tp_rank: int, tp_size: int) -> Part | None:
    """Which weights a worker has whose tensor has a shape of its `own`, or `None` if that is not known."""
    if own == shape:
        return Part.whole(name, shape, replica=tp_rank > 0)
    if tp_size == 1:
        return None
    if own[1:] == shape[1:] and own[0] * tp_size % shape[0] == 0:
        # Rows; of few key and value heads, several ranks have the same
        ranks = own[0] * tp_size // shape[0]
        return Part.piece(name, shape, tp_rank // ranks * own.numel(), own.numel(), replica=tp_rank % ranks > 0)
    if own[:-1] == shape[:-1] and own[-1] * tp_size == shape[-1]:
        return Part(name, shape, tp_rank * own[-1], own[-1], shape[-1])
    if len(own) == 3 and own[0] == shape[0] and own[1] * tp_size == shape[1]:
        # Rows of each expert's gate, then of its up projection
        run = own[1] // 2 * own[2]
        return Part(name, shape, tp_rank * run, run, run * tp_size)
    return None


def _padding(module: nn.Module, tensor: torch.Tensor) -> int:
    vocabulary = getattr(module, "shard_indices", None)
    if vocabulary is None:
        return 0
    rows = vocabulary.org_vocab_end_index - vocabulary.org_vocab_start_index
    return tensor.numel() - rows * tensor.shape[1:].numel()
