"""Where vLLM keeps the weights of a model: every parameter of the Transformers model as a view of the engine's own.

vLLM fuses projections, pads vocabularies and shards over tensor-parallel ranks. What a parameter is called, its shape
and its noise are those of Transformers, so that an engine and a plain model get the same perturbations.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..weights.store import Home


# Stacked experts of Transformers, as the parameters that hold them in vLLM
EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}

RENAMED = (".mlp.", ".block_sparse_moe.")  # Mixtral's layers in Transformers, and in vLLM
WRAPPED = ".base_layer"  # what a module that LoRA has wrapped is called in its wrapper


class LoadError(RuntimeError):
    """The engine does not have the weights of the model in a form that can be perturbed."""


def find_homes(
    engine: nn.Module, parameters: Mapping[str, torch.Size], tp_rank: int = 0, tp_size: int = 1
) -> dict[str, Home]:
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

    Returns:
        `dict[str, Home]`: Where each of them is.

    Raises:
        [`LoadError`]: If a parameter is missing or has another shape, or the engine has weights that belong to none;
            names them.
    """
    modules, held = _modules_and_parameters(engine)
    covered = dict.fromkeys(held, 0)
    homes, problems = {}, []
    for name, shape in parameters.items():
        found = _find(name, engine, modules, held)
        if found is None:
            problems.append(f"{name} is missing")
            continue
        holder, tensor = found
        home = _home(tensor, shape, modules[holder.rpartition(".")[0]], tp_rank, tp_size)
        if home is None:
            problems.append(f"{name} has shape {list(shape)}, but {list(tensor.shape)} in {holder}")
            continue
        homes[name] = home
        covered[holder] += home.weights.numel()
    # Padding of the vocabulary is no weight
    strange = [
        f"{name} has {tensor.numel() - covered[name]} weights that belong to no parameter of the model"
        for name, tensor in held.items()
        if covered[name] < tensor.numel() - _padding(modules[name.rpartition(".")[0]], tensor)
    ]
    if problems or strange:
        raise load_error(problems + strange)
    return homes


def carried_by_lora(engine: nn.Module, names: Iterable[str]) -> set[str]:
    """Which parameters of a Transformers model an adapter can change, in an engine with LoRA enabled."""
    from vllm.model_executor.layers.linear import LinearBase

    modules, held = _modules_and_parameters(engine)
    wrapped = {
        f"{name.removesuffix(WRAPPED)}.weight"
        for name, module in engine.named_modules()
        if name.endswith(WRAPPED) and isinstance(module, LinearBase)
    }
    holders = {name: _find(name, engine, modules, held) for name in names}
    return {name for name, found in holders.items() if found is not None and found[0] in wrapped}


def check_values(homes: Mapping[str, Home], parameters: Mapping[str, torch.Tensor]) -> None:
    """
    Compare the engine's weights with those of the model, bit for bit: fused weights may lie in another order.

    Args:
        homes (`Mapping[str, Home]`):
            What `find_homes` returned.
        parameters (`Mapping[str, torch.Tensor]`):
            The parameters in Transformers, whole, in any dtype.

    Raises:
        [`LoadError`]: If they differ; names the parameters.
    """
    refuse_other_values([name for name, home in homes.items() if not has_values(home, home.part_of(parameters[name]))])


def has_values(home: Home, part: torch.Tensor) -> bool:
    """Whether the engine's weights are those of a part of a parameter, rounded to their dtype."""
    return torch.equal(part.to(home.weights), home.weights)


def refuse_other_values(names: Sequence[str]) -> None:
    """
    Raises:
        [`LoadError`]: If there are parameters whose values are not the model's.
    """
    if names:
        raise load_error([f"{name} has other values than the model's" for name in names])


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
    found = _find_named(name, engine, modules, held)
    return found or _find_named(name.replace(*RENAMED), engine, modules, held)


def _find_named(
    name: str, engine: nn.Module, modules: dict[str, nn.Module], held: dict[str, torch.Tensor]
) -> tuple[str, torch.Tensor] | None:
    if name in held:
        return name, held[name].data
    module, _, kind = name.rpartition(".")
    if kind in EXPERTS:
        for holder in (f"{module}.{EXPERTS[kind]}", f"{module}.routed_experts.{EXPERTS[kind]}"):
            if holder in held:
                return holder, held[holder].data
    parent, _, projection = module.rpartition(".")
    fused = {part: whole for whole, parts in engine.packed_modules_mapping.items() for part in parts}
    holders = [f"{parent}.{fused[projection]}.{kind}"] if projection in fused else []
    if hasattr(engine, "hf_to_vllm_mapper"):
        holders.append(engine.hf_to_vllm_mapper.map_name(name))
    holder = next((holder for holder in holders if holder in held), None)
    if holder is None:
        return None
    module = holder.rpartition(".")[0]
    parts = engine.packed_modules_mapping.get(module.rpartition(".")[2], [])
    tensor = held[holder].data
    if projection not in parts:
        return holder, tensor
    sizes = modules[module].output_partition_sizes
    if sum(sizes) != len(tensor):  # packed away
        return holder, tensor
    return holder, tensor.split(sizes)[parts.index(projection)]


def _home(tensor: torch.Tensor, shape: torch.Size, module: nn.Module, tp_rank: int, tp_size: int) -> Home | None:
    """How a tensor of the engine lies in a parameter of that shape, or `None` if it does not."""
    if not tensor.is_contiguous() or tensor.dim() != len(shape):
        return None
    vocabulary = getattr(module, "shard_indices", None)
    if vocabulary is not None and tensor.shape[1:] == shape[1:]:
        start, stop = vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index
        if module.org_vocab_size == shape[0]:
            return Home(tensor[: stop - start].view(-1), start * shape[1:].numel())
    if tensor.shape == shape:
        return Home(tensor.view(-1), copy=tp_rank > 0)
    if tp_size == 1:
        return None
    if tensor.shape[1:] == shape[1:] and tensor.shape[0] * tp_size % shape[0] == 0:
        # Rows; of few key and value heads, several ranks have the same
        ranks = tensor.shape[0] * tp_size // shape[0]
        return Home(tensor.view(-1), tp_rank // ranks * tensor.numel(), copy=tp_rank % ranks > 0)
    if tensor.shape[:-1] == shape[:-1] and tensor.shape[-1] * tp_size == shape[-1]:
        columns = tensor.shape[-1]
        return Home(tensor.view(-1), runs=(tp_rank * columns, columns, shape[-1]))
    if tensor.dim() == 3 and tensor.shape[0] == shape[0] and tensor.shape[1] * tp_size == shape[1]:
        # Rows of each expert's gate, then of its up projection
        run = tensor.shape[1] // 2 * tensor.shape[2]
        return Home(tensor.view(-1), runs=(tp_rank * run, run, run * tp_size))
    return None


def _padding(module: nn.Module, tensor: torch.Tensor) -> int:
    vocabulary = getattr(module, "shard_indices", None)
    if vocabulary is None:
        return 0
    rows = vocabulary.org_vocab_end_index - vocabulary.org_vocab_start_index
    return tensor.numel() - rows * tensor.shape[1:].numel()
