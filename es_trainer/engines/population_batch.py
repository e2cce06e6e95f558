"""
Many members in one batch.

The members share the model's weights. While a group of them is installed, the trained parameters are replaced by
tensors that know which member each row of the batch belongs to, and that give every row the product with its member's
weights: the shared product plus the member's low-rank term, or a batched product of the members' stacked weights.
"""

import contextlib
import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from torch import nn
from transformers import Cache, PreTrainedModel

from ..evolution.population import Member
from ..noise.shapes import Factors
from ..weights.metadata import METADATA
from ..weights.store import Weights
from . import trial


if TYPE_CHECKING:
    from peft import PeftModel


TRIAL_ROWS = (0, 1, 1)  # members of the rows that are tried
TRIAL_MEMBERS = (Member(seed=1), Member(seed=2, sign=-1))
# Close to one another: from too little to be seen to where rounding alone makes other answers, a factor of 3 is all
# that adapters in 16 bits may have
TRIAL_SIGMAS = tuple(0.003 * 2 ** (n / 2) for n in range(21))
SEEN = 0.3  # distance between members that is enough to tell them apart from rounding


class CannotBatch(Exception):
    """A parameter is used in a way that is not known for many members at once."""

    parameter: str | None = None  # its name


class Rows:
    """
    Which member each row of the batch under way belongs to.

    Args:
        group (`int`):
            Number of members in the group.
        device (`torch.device`):
            Device of the activations.
    """

    def __init__(self, group: int, device: torch.device):
        self.group = group
        self.device = device
        self.tokens: int | None = None  # of each row in the forward pass under way
        self.parameters: list[MemberParameter] = []  # that the members have values of
        self.assign(range(group))

    def __len__(self) -> int:
        return self.group

    def assign(self, members: Sequence[int]) -> None:
        """Say to which member each row of the next forward passes belongs."""
        self.count = len(members)
        self.members = torch.tensor(members, device=self.device)
        counts = Counter(members)
        first, last = min(counts), max(counts)
        self.largest = max(counts.values())
        self.span = slice(first, last + 1)
        # Equally many rows of each member, one member's after another's: products need no gathering
        per_member = [member for member in range(first, last + 1) for _ in range(self.largest)]
        self.even = list(members) == per_member
        seen: Counter[int] = Counter()
        slots = []
        for member in members:
            slots.append((member - first) * self.largest + seen[member])
            seen[member] += 1
        self.slots = torch.tensor(slots, device=self.device)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """View activations of shape `(rows, ..., width)` or `(rows * tokens, width)` as `(rows, tokens, width)`."""
        # Some of the tokens, such as those of one expert in a list of experts, may be of any rows
        whole = x.shape[0] % self.count == 0 if self.tokens is None else x.shape[0] == self.count * self.tokens
        if x.shape[0] != self.count and (x.dim() != 2 or not whole):
            raise CannotBatch(f"activations of shape {tuple(x.shape)} do not tell apart {self.count} rows")
        return x.reshape(self.count, -1, x.shape[-1])

    def spread(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The rows' values of a vector, of shape `(members, width)`, in a shape that broadcasts with x."""
        if x.shape[0] == self.count and x.dim() > 1:
            return values[self.members].view(self.count, *[1] * (x.dim() - 2), values.shape[-1])
        tokens = self.split(x).shape[1]
        return values[self.members.repeat_interleave(tokens)]


class MemberParameter(torch.Tensor):
    """
    A parameter that has a value of its own in each member of a group.

    To everything that only asks for shape, dtype or device it is the shared parameter. What uses its values gets each
    row's own, or [`CannotBatch`] if that is not known.
    """

    parameter_name: str
    shared: torch.Tensor
    values: Factors | torch.Tensor
    rows: Rows
    used: bool

    @classmethod
    def make(cls, name: str, shared: torch.Tensor, values: Factors | torch.Tensor, rows: Rows) -> "MemberParameter":
        if isinstance(values, torch.Tensor) and values.dim() == 1:
            values = values[:, None]  # of a scalar, as a vector of width 1
        with torch._C.DisableTorchFunctionSubclass():
            self = shared.as_subclass(cls)
        self.parameter_name, self.shared, self.values, self.rows, self.used = name, shared, values, rows, False
        return self

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        parameters = [value for value in (*args, *kwargs.values()) if isinstance(value, cls)]
        for parameter in parameters:
            parameter.used = True
        try:
            if func in PRODUCTS:
                return PRODUCTS[func](parameters[0].rows, *args, **kwargs)
            if func in ELEMENTWISE and all(parameter.dim() <= 1 for parameter in parameters):
                return _elementwise(func, args, kwargs)
            raise CannotBatch(f"`{func.__name__}` of a tensor of {parameters[0].dim()} dimensions is not known")
        except CannotBatch as error:
            error.parameter = parameters[0].parameter_name
            raise


# ---- what parameters are used for ----


def _has_kernels(device: torch.device) -> bool:
    """Whether there are kernels that do the work of many operations; they are imported where they are used."""
    return device.type == "cuda"


# Their arguments have the names that torch gives them: models may pass them by keyword


def _linear(rows: Rows, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    x = input.contiguous()  # of other activations and a weight without gradient, torch makes a product for each row
    if not isinstance(weight, MemberParameter):
        out = F.linear(x, weight)
    elif isinstance(weight.values, Factors):
        out = F.linear(x, weight.shared)
        _add_low_rank(rows, x, out, weight.values.left[:, 0], weight.values.right[:, 0])
    else:
        out = _stacked(rows, x, weight.values.mT)
    return out if bias is None else _add_bias(rows, out, bias)


def _addmm(rows: Rows, input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    """GPT-2's Conv1D: `x @ weight + bias`."""
    bias, x, weight = input, mat1, mat2
    if not isinstance(weight, MemberParameter):
        out = x @ weight
    elif isinstance(weight.values, Factors):
        out = x @ weight.shared
        _add_low_rank(rows, x, out, weight.values.right[:, 0], weight.values.left[:, 0])
    else:
        out = _stacked(rows, x, weight.values)
    return _add_bias(rows, out, bias)


def _add_low_rank(rows: Rows, x: torch.Tensor, out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add each row's `x @ right.T @ left` to `out`; the factors have shape (members, rank, width)."""
    x, out = rows.split(x), rows.split(out)
    if _has_kernels(x.device):
        from .fused_low_rank import add_low_rank

        add_low_rank(x, out, left, right, rows.members)
        return
    if rows.even:
        left, right = left[rows.span], right[rows.span]
        x, out = x.reshape(len(left), -1, x.shape[-1]), out.view(len(left), -1, out.shape[-1])
    else:
        left, right = left[rows.members], right[rows.members]
    if left.shape[1] == 1:
        # As fast as memory; batched products of vectors are several times slower on CPU
        out.addcmul_((x * right).sum(-1, keepdim=True), left)
    else:
        out.baddbmm_(x @ right.mT, left)


def _stacked(rows: Rows, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each row's `x @ weights[member]`; the weights have shape (members, in, out)."""
    weights = weights[rows.span]
    split = rows.split(x)
    tokens, width = split.shape[1:]
    if rows.even:
        out = split.reshape(len(weights), -1, width) @ weights
    else:
        padded = split.new_zeros(len(weights) * rows.largest, tokens, width)
        padded[rows.slots] = split
        out = padded.view(len(weights), -1, width) @ weights
        out = out.view(-1, tokens, out.shape[-1])[rows.slots]
    return out.view(*x.shape[:-1], out.shape[-1])


def _add_bias(rows: Rows, out: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if isinstance(bias, MemberParameter):
        bias = rows.spread(bias.values, out)
    return out.add_(bias)


def _embedding(rows: Rows, input: torch.Tensor, weight: MemberParameter, *args: Any, **kwargs: Any) -> torch.Tensor:
    ids = input
    if ids.dim() != 2 or ids.shape[0] != rows.count:
        raise CannotBatch(f"indices of shape {tuple(ids.shape)} do not tell apart {rows.count} rows")
    members = rows.members[:, None]
    if not isinstance(weight.values, Factors):
        return weight.values[members, ids]
    out = F.embedding(ids, weight.shared)
    left = weight.values.left[:, 0].transpose(1, 2)[members, ids]  # (rows, tokens, rank)
    return out.baddbmm_(left, weight.values.right[:, 0][rows.members])


def _layer_norm(
    rows: Rows,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    return _scale(rows, F.layer_norm(input, normalized_shape, eps=eps), weight, bias)


def _rms_norm(
    rows: Rows,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    if _has_kernels(input.device):
        from .fused_rms_norm import rms_norm

        eps = torch.finfo(torch.float32).eps if eps is None else eps  # as torch has it
        return rms_norm(rows.split(input), weight.values, rows.members, eps).view(input.shape)
    return _scale(rows, F.rms_norm(input, normalized_shape, eps=eps), weight, None)


def _scale(rows: Rows, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    if weight is not None:
        x = x.mul_(rows.spread(weight.values, x) if isinstance(weight, MemberParameter) else weight)
    return x if bias is None else _add_bias(rows, x, bias)


def _elementwise(func: Callable, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """A function of vectors alone is computed for all members; one of vectors and activations for all rows."""
    parameters = [value for value in args if isinstance(value, MemberParameter)]
    rows = parameters[0].rows
    x = next((value for value in args if isinstance(value, torch.Tensor) and value.dim() > 1), None)
    if x is not None:
        out = func(*(rows.spread(a.values, x) if isinstance(a, MemberParameter) else a for a in args), **kwargs)
        # Members' vectors may have more bits than the parameter, which are no reason for more bits of activations
        shared = (a.shared if isinstance(a, MemberParameter) else a[:0] if a is x else a for a in args)
        return out.to(func(*shared, **kwargs).dtype)
    plain = [a.values if isinstance(a, MemberParameter) else a for a in args]
    shared = func(*(a.shared if isinstance(a, MemberParameter) else a for a in args), **kwargs)
    return MemberParameter.make(parameters[0].parameter_name, shared, func(*plain, **kwargs), rows)


Tensor = torch.Tensor
PRODUCTS = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
ELEMENTWISE = {
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
    *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__),
    *(Tensor.float, Tensor.to, Tensor.type_as),
}


# ---- norms ----


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module computes by the same code as Llama's RMS norm, of which most models have a copy."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    forward = module.forward.__func__ if inspect.ismethod(module.forward) else None
    return inspect.isfunction(forward) and _code(forward) == _code(LlamaRMSNorm.forward)


def _code(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    return code.co_code, code.co_consts, code.co_names, code.co_varnames


def _rms_norm_forward(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the module's own forward does in ten operations."""
    weight = module.weight
    return F.rms_norm(hidden_states, weight.shape, weight, module.variance_epsilon)


# ---- experts ----


def _is_experts(module: nn.Module) -> bool:
    """Whether the module is one of Transformers' mixtures of gated experts without biases."""
    parameters = dict(module.named_parameters(recurse=False))
    return parameters.keys() == {"gate_up_proj", "down_proj"} and vars(module).get("is_transposed") is False


def _experts_forward(
    module: nn.Module, rows: Rows, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What the module's own forward does, for x of shape `(rows * tokens, width)`."""
    top_k = top_k_index.shape[-1]
    members = rows.members.repeat_interleave(rows.split(x).shape[1])
    by_expert = top_k_index.flatten().argsort(stable=True)
    counts = top_k_index.flatten().bincount(minlength=module.num_experts).tolist()
    out = x.new_empty(len(by_expert), x.shape[-1])
    for expert, pairs in enumerate(by_expert.split(counts)):
        if len(pairs):
            tokens = pairs // top_k
            hidden = _expert_linear(x[tokens], module.gate_up_proj, expert, members[tokens])
            out[pairs] = _expert_linear(module._apply_gate(hidden), module.down_proj, expert, members[tokens])
    out *= top_k_weights.reshape(-1, 1)
    return out.view(len(x), top_k, -1).sum(1)


def _expert_linear(x: torch.Tensor, weight: torch.Tensor, expert: int, members: torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, MemberParameter):
        return F.linear(x, weight[expert])
    weight.used = True
    if isinstance(weight.values, Factors):
        left, right = weight.values.left[members, expert], weight.values.right[members, expert]
        inner = torch.einsum("ni,nri->nr", x, right)
        return F.linear(x, weight.shared[expert]) + torch.einsum("nr,nro->no", inner, left)
    out = x.new_empty(len(x), weight.shared.shape[1])
    for member in members.unique().tolist():
        mine = members == member
        out[mine] = F.linear(x[mine], weight.values[member, expert])
    return out


# ---- memory ----

FREE_SHARE = 0.8  # of the free memory that a group may take; activations come on top


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        # In a container, which the figures of the whole machine say nothing about
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the processes of this machine share it


def _bytes(cache: Cache | None) -> int:
    layers = cache.layers if isinstance(cache, Cache) else []
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


# ---- the model ----


class PopulationBatch:
    """
    Evaluates groups of members with one model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        weights ([`Weights`]):
            Its trained weights.
    """

    def __init__(self, model: "PreTrainedModel | PeftModel", weights: Weights):
        self.model = model
        self.weights = weights
        self.cache_bytes = 0  # of a token's keys and values, as `check` found them
        self.owners = owners_of_parameters(model)
        self._forwards = _forwards(model)

    def check_forwards(self) -> None:
        """
        Raises:
            `RuntimeError`: If modules compute in another way than when this was made.
        """
        if _forwards(self.model) != self._forwards:
            raise RuntimeError(
                "The model's modules compute in another way than when the trainer was made (`forward` was replaced or "
                "compiled), so it is not known whether perturbations would reach them. Change the model first, and "
                "make the trainer of it then; or set population_batch_size=1 and perturbation='gaussian'."
            )

    @contextlib.contextmanager
    def install(self, members: Sequence[Member], sigma: float) -> Iterator[Rows]:
        """Inside, the model evaluates `members`. What is yielded has to be told each batch's rows."""
        rows = Rows(len(members), self.model.device)
        replaced: list[tuple[dict[str, Any], str, Any]] = []

        def install(module: nn.Module, attribute: str, value: Any) -> None:
            # An attribute of the instance goes before a parameter or method of the same name and leaves it as it is
            attributes = vars(module)
            replaced.append((attributes, attribute, attributes.get(attribute)))
            attributes[attribute] = value

        def count_tokens(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            rows.tokens = (args[0] if args else kwargs["input_ids"]).shape[1]

        hook = self._base().register_forward_pre_hook(count_tokens, with_kwargs=True)
        try:
            for shard, values in self.weights.all_of_members(members, sigma):
                parameter = MemberParameter.make(shard.name, shard.layout.computed, values, rows)
                rows.parameters.append(parameter)
                for _, module, attribute in self.owners[shard.parameter]:
                    install(module, attribute, parameter)
                    if "forward" not in vars(module) and (forward := _forward_for(rows, module)):
                        install(module, "forward", forward)
            yield rows
        finally:
            hook.remove()
            for attributes, attribute, before in reversed(replaced):
                if before is None:
                    del attributes[attribute]
                else:
                    attributes[attribute] = before

    def check(self, inputs: dict[str, torch.Tensor] | None = None) -> str | None:
        """
        Try two members, together and one at a time; returns why the model cannot evaluate many members at once, if so.

        Args:
            inputs (`dict[str, torch.Tensor]`, *optional*):
                What they are to read, if not texts alone; see [`trial.answers`].
        """
        try:
            return self._compare(inputs)
        except CannotBatch as error:
            return self._describe(error.parameter, str(error)) if error.parameter else str(error)
        except Exception as error:  # whatever a model raises that is given weights that it does not know
            return f"{type(error).__name__}: {' '.join(str(error).split())}"

    def _compare(self, inputs: dict[str, torch.Tensor] | None) -> str | None:
        differences = []
        for sigma in TRIAL_SIGMAS:
            alone = [self._answers_alone(member, sigma, inputs) for member in TRIAL_MEMBERS]
            apart = trial.distance(*alone)
            if apart <= SEEN:
                continue
            together, unused = self._answers_together(sigma, inputs)
            if unused is not None:
                return self._describe(unused, "no function that is known uses it")
            expected = torch.stack([alone[member][row] for row, member in enumerate(TRIAL_ROWS)])
            differences.append(trial.distance(together, expected))
            # In 16 bits, what is added to the weights may be lost if it is small, and the rounding of activations is
            # the larger the further the model is from what it was: an error in what is computed is seen at any size
            if differences[-1] <= trial.tolerance(self.model) * max(1.0, apart):
                return None
        if not differences:
            return "its answers do not depend enough on the trained parameters to tell members apart"
        return f"the answers of members together are {min(differences):.1%} away from their answers one at a time"

    def _answers_together(
        self, sigma: float, inputs: dict[str, torch.Tensor] | None
    ) -> tuple[torch.Tensor, str | None]:
        """Answers of several rows of the members, and the name of a parameter that was not used for them."""
        with (
            self.weights.gathered(for_members=True, masters=False),
            self.install(TRIAL_MEMBERS, sigma) as rows,
            self._measured_cache(),
        ):
            rows.assign(TRIAL_ROWS)
            together = trial.answers(self.model, inputs=inputs)
            return together, next((p.parameter_name for p in rows.parameters if not p.used), None)

    def _answers_alone(self, member: Member, sigma: float, inputs: dict[str, torch.Tensor] | None) -> torch.Tensor:
        # Partitioned weights are gathered anew for each member, and without masters there is nothing to restore from
        with self.weights.gathered(for_members=True, masters=False):
            shards = self.weights.shards if self.weights.drifts else []
            kept = [(shard.working, shard.working.to("cpu", copy=True)) for shard in shards]
            try:
                self.weights.perturb(member, sigma)
                return trial.answers(self.model, inputs=inputs)
            finally:
                self.weights.restore()
                for working, values in kept:
                    working.copy_(values)

    @contextlib.contextmanager
    def _measured_cache(self) -> Iterator[None]:
        """Inside, the first forward pass says how much memory a token takes."""

        def measure(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            hook.remove()
            self.cache_bytes = _bytes(output.get("past_key_values")) // kwargs["input_ids"].numel()

        hook = self._base().register_forward_hook(measure, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def fitting(self, rows: int, tokens: int, most_rows: int | None = None) -> tuple[int, int]:
        """
        What fits into the memory that is free now.

        Args:
            rows (`int`):
                Sequences of each member.
            tokens (`int`):
                Length of the longest one, with its prompt.
            most_rows (`int`, *optional*):
                Most sequences generated at once. If `None`, all of a group.

        Returns:
            `tuple[int, int]`: members in a group, at least 1, and sequences generated at once; 0 if not even one fits.
        """
        free = int(FREE_SHARE * free_memory(self.model.device))
        vocabulary = self.model.config.get_text_config().vocab_size
        # The cache, and the logits with two copies in float32 that logits processors make
        row = self.cache_bytes * tokens + vocabulary * (self.model.dtype.itemsize + 8)
        member = self.weights.member_bytes()
        if most_rows is None:
            members = free // (member + rows * row)
            return (members, members * rows) if members else (1, max(0, free - member) // row)
        members = (free - most_rows * row) // member
        return (members, most_rows) if members > 0 else (1, min(most_rows, max(0, free - member) // row))

    def _base(self) -> PreTrainedModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _describe(self, name: str, reason: str) -> str:
        shard = next(shard for shard in self.weights.shards if shard.name == name)
        path, module, attribute = self.owners[shard.parameter][0]
        return f"`{path}` ({type(module).__name__}) with its parameter `{attribute}`: {reason}"


def owners_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module, str]]]:
    """The path, the module and the attribute by which modules have each parameter. Tied ones have several."""
    owners: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((path, module, attribute))
    return owners


def _forward_for(rows: Rows, module: nn.Module) -> Callable | None:
    """What a module computes with that has parameters of members, if not with its own forward."""
    if _is_experts(module):
        return functools.partial(_experts_forward, module, rows)
    if _has_kernels(rows.device) and _is_rms_norm(module):
        return functools.partial(_rms_norm_forward, module)
    return None


def _forwards(model: nn.Module) -> dict[str, Any]:
    """What each module computes with, compiled or not."""
    return {
        name: (getattr(module.forward, "__func__", module.forward), module._compiled_call_impl)
        for name, module in model.named_modules()
    }
