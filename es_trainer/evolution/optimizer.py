"""The evolution strategy as a `torch.optim.Optimizer`: ask, tell, step."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint import StorageReader

from ..choices import AnchorPenalty, FitnessShaping, MasterWeights, Rule
from ..noise import noise
from ..noise.shapes import Gaussian, Sum
from ..weights.distributed_checkpoint import Slice, StateDicts, load
from ..weights.layouts import EngineWeights, Quantized
from ..weights.part import Part
from ..weights.pinned import PinnedMemory
from ..weights.scalars import to_host
from ..weights.shard import Shard
from ..weights.store import Weights
from .fitness import utilities
from .population import Member, Population
from .update_rules import UPDATE_RULES


TINY = torch.finfo(torch.float32).tiny

# Gives weights of a part of a parameter as they were initially, from one index of the part to another
ReadInitialWeights = Callable[[Part, int, int], torch.Tensor]

DISTANCE_SAMPLE = 1 << 20  # least number of weights from which the distance from the start is measured


@dataclass(frozen=True)
class UpdateRecord:
    """
    What an update is made of: everything else follows from the weights before it.

    Args:
        seeds (`list[int]`):
            Seeds of the members.
        signs (`list[int]`):
            Signs of their noise.
        utilities (`list[float]`):
            Their utilities.
    """

    seeds: list[int]
    signs: list[int]
    utilities: list[float]

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> "UpdateRecord":
        """That of a line of a history."""
        return cls(line["seeds"], line["signs"], line["utilities"])

    def coefficients(self) -> dict[int, float]:
        """Factors of the noises in g, by seed; the two halves of an antithetic pair become one."""
        factors: dict[int, float] = {}
        for seed, sign, utility in zip(self.seeds, self.signs, self.utilities, strict=True):
            factors[seed] = factors.get(seed, 0.0) + sign * utility / len(self.seeds)
        return factors

    def cosine(self, other: "UpdateRecord") -> float:
        """
        Cosine of the angle between the estimates g of two updates.

        It follows from the coefficients alone. With D weights, the noises of two seeds have an expected inner product
        of 0, and a noise has one of D with itself. So `cosine = sum_i c_i * c'_i / (|c| * |c'|)` over all seeds, which
        is 0 if no seed is in both. With Gaussian noise, the error is of the order of `1 / sqrt(D)`. The norms of
        low-rank noises differ more: those of a `(m, n)` matrix have a relative error of the order of
        `sqrt((1/m + 1/n) / rank)`.

        Args:
            other ([`UpdateRecord`]):
                The other update.

        Returns:
            `float`: NaN if all coefficients of an update are 0.
        """
        mine, theirs = self.coefficients(), other.coefficients()
        lengths = math.hypot(*mine.values()) * math.hypot(*theirs.values())
        if lengths == 0.0:
            return math.nan
        return math.fsum(factor * theirs.get(seed, 0.0) for seed, factor in mine.items()) / lengths


class EvolutionStrategy(torch.optim.Optimizer):
    """
    Evolution strategy over all given weights (arXiv 2509.24372), with ask / tell / step.

    `step` moves the weights by `lr * g` with the ES estimate `g = 1/N * sum_n utility_n * sign_n * noise(seed_n)`
    ("sgd"; the paper's update, its alpha being `lr`), by `lr` times an exponential average of g ("momentum":
    `m = beta1 * m + g`), or by Adam's rule with g as the ascent direction ("adam"). Both decays are decoupled:

        weights += -lr * weight_decay * weights - lr * anchor_decay * (weights - initial weights)

    With `anchor_penalty="l1"`, each weight moves by `lr * anchor_decay` towards its initial value, and not beyond it.

    N is the size of the population, however many members have a fitness: one without weighs like an average member,
    so the less is known, the shorter is the step.

    Args:
        params (`Iterable[tuple[str, nn.Parameter]]` or parameter groups of such):
            Named parameters. Names key the noise.
        lr (`float`, *optional*, defaults to `5e-4`):
            Learning rate, the paper's alpha.
        sigma (`float`, *optional*, defaults to `1e-3`):
            Standard deviation of the perturbations.
        population_size (`int`, *optional*, defaults to `30`):
            Members per step, N.
        antithetic (`bool`, *optional*, defaults to `False`):
            Evaluate each noise with both signs.
        num_steps_per_population (`int`, *optional*, defaults to `1`):
            Steps that have the same members.
        fitness_shaping (`str`, *optional*, defaults to `"z_score"`):
            How rewards become utilities; see [`fitness.utilities`].
        rule (`str`, *optional*, defaults to `"sgd"`):
            `"sgd"`, `"momentum"` (4 more bytes a weight) or `"adam"` (8 more bytes a weight).
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay rates of the averages; momentum uses the first.
        eps (`float`, *optional*, defaults to `1e-8`):
            Adam's epsilon.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Decay towards zero.
        anchor_decay (`float`, *optional*, defaults to `0.0`):
            Decay towards the initial weights: Anchored Weight Decay (arXiv 2605.30148).
        anchor_penalty (`str`, *optional*, defaults to `"l2"`):
            `"l2"` (far weights are pulled harder) or `"l1"` (all are pulled the same, so many stay where they began).
        anchor_weights (`str` or `Callable[[Part, int, int], torch.Tensor]`, *optional*, defaults to `"device"`):
            Where the initial weights are, if `anchor_decay > 0`. It changes no bit of the updates:

            - `"device"`: a copy beside the masters.
            - `"host"`: a copy in host memory, pinned if the weights are on an accelerator.
            - A function: there is no copy. It is called with a part of a parameter and two indices of the part, and
              returns the initial weights from the one to the other, in the dtype of a file that they were loaded from.
        master_weights (`str`, *optional*, defaults to `"device"`):
            Where the float32 masters are; see [`Weights`].
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights that the model computes with. `None` keeps each parameter's.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the run.
        perturbation ([`Gaussian`] or [`LowRank`], *optional*, defaults to `Gaussian()`):
            Shape of the noise.
        frozen (`Iterable[torch.Tensor]`, *optional*):
            The model's other parameters, and buffers; see [`Weights`].
        engine_weights (`dict[nn.Parameter, EngineWeights]`, *optional*):
            The weights that an inference engine has of the parameters; see [`Weights`].
        float32 (`Collection[str]`, *optional*):
            Names of parameters that are computed with in float32 whatever `dtype` is.
        quantized (`Mapping[nn.Parameter, Quantized]`, *optional*):
            The layouts of parameters that are computed with from 8 bits; see [`Weights`].

    Raises:
        `ValueError`: If `anchor_weights` is a function that returns other weights than the parameters hold.
    """

    weights_kind: type[Weights] = Weights

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]],
        lr: float = 5e-4,
        sigma: float = 1e-3,
        population_size: int = 30,
        antithetic: bool = False,
        num_steps_per_population: int = 1,
        fitness_shaping: FitnessShaping = "z_score",
        rule: Rule = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        anchor_decay: float = 0.0,
        anchor_penalty: AnchorPenalty = "l2",
        anchor_weights: Literal["device", "host"] | ReadInitialWeights = "device",
        master_weights: MasterWeights = "device",
        dtype: torch.dtype | None = None,
        seed: int = 42,
        perturbation: Gaussian | None = None,
        frozen: Iterable[torch.Tensor] = (),
        engine_weights: dict[nn.Parameter, EngineWeights] | None = None,
        float32: Collection[str] = (),
        quantized: Mapping[nn.Parameter, Quantized] | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.sigma = sigma
        self.population_size = population_size
        self.antithetic = antithetic
        self.num_steps_per_population = num_steps_per_population
        self.fitness_shaping = fitness_shaping
        self.rule = rule
        self._rule = UPDATE_RULES[rule](betas, eps)
        self.anchor_decay = anchor_decay
        self.anchor_penalty = anchor_penalty
        self.anchor_weights = anchor_weights
        self.seed = seed
        self.step_scale = 1.0  # length of the next steps, as a multiple of what `lr` says
        self.update_norm = 0.0  # of the last step
        self.update_record: UpdateRecord | None = None  # of the next step

        named = [
            (name, parameter)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
        self.weights = self.weights_kind(
            named, dtype, master_weights, perturbation, frozen, engine_weights, float32, quantized
        )
        self._stride = _stride([shard.shape for shard in self.weights.shards])
        self.begin()

    def begin(self) -> None:
        """Forget all updates but what the weights have become."""
        self.updates = 0  # steps done
        self.moves = 0  # those of them that moved the weights: what Adam's averages are made of
        self._pinned = PinnedMemory()
        for shard in self.weights.shards:
            self.state[shard.parameter] = self._initial_state(shard)

    def _initial_state(self, shard: Shard) -> dict[str, torch.Tensor]:
        state = {key: torch.zeros_like(shard.trained, dtype=torch.float32) for key in self._rule.averages}
        state["start"] = self._sample(shard).clone()
        if self._reads_anchor:
            noise.for_pieces(functools.partial(self._check_anchor, shard), shard.part.numel, shard.working.device)
        elif self.anchor_decay > 0 and self.anchor_weights == "host":
            state["anchor"] = self._pinned.copy(shard.trained, shard.checkpoint_dtype, shard.working.device)
        elif self.anchor_decay > 0:
            state["anchor"] = shard.trained.to(shard.checkpoint_dtype, copy=True)
        return state

    @property
    def _reads_anchor(self) -> bool:
        """Whether the initial weights are read instead of kept."""
        return self.anchor_decay > 0 and callable(self.anchor_weights)

    def _anchor(self, shard: Shard, low: int, high: int) -> torch.Tensor:
        """The initial weights of a piece of a shard, in the dtype of checkpoints, on the device of the weights."""
        device = shard.working.device
        if not callable(self.anchor_weights):
            return self.state[shard.parameter]["anchor"][low:high].to(device)
        # Through all dtypes that the weights went through
        read = self.anchor_weights(shard.part, low, high).to(device).to(shard.checkpoint_dtype)
        return read.to(shard.trained.dtype).to(shard.checkpoint_dtype)

    def _check_anchor(self, shard: Shard, low: int, high: int) -> None:
        weights = shard.trained[low:high].to(shard.working.device, shard.checkpoint_dtype)
        if not torch.equal(self._anchor(shard, low, high), weights):
            raise ValueError(
                f"`anchor_weights='model'` is not valid: the files of the model have other weights of `{shard.name}` "
                "than the model, because they are changed as it is loaded. Set it to 'host', which keeps a copy in "
                "host memory."
            )

    def _sample(self, shard: Shard) -> torch.Tensor:
        """Every k-th weight, whatever part of the parameter the shard is."""
        own, _ = shard.part.sample(self._stride)
        return shard.trained[own]

    def _sample_every(self, stride: int) -> None:
        """Measure the distance from the start on another sample from now on."""
        if stride != self._stride:
            self._stride = stride
            for shard in self.weights.shards:
                self.state[shard.parameter]["start"] = self._sample(shard).clone()

    # ---- ask, tell, step ----

    def ask(self) -> Population:
        """The members to evaluate next; the same until the next step."""
        return Population.sample(
            self.population_size, self.seed, self.updates, self.antithetic, self.num_steps_per_population
        )

    def perturb(self, member: Member) -> None:
        """Write `weights + sigma * sign * noise(seed)` into the model."""
        self.weights.perturb(member, self.sigma)

    def restore(self) -> None:
        """Write the unperturbed weights into the model."""
        self.weights.restore()

    def tell(
        self,
        population: Population,
        rewards: Sequence[float] | np.ndarray,
        members_per_prompt: int | None = None,
    ) -> np.ndarray:
        """
        Say how good the members were.

        Args:
            population ([`Population`]):
                What `ask` returned.
            rewards (`np.ndarray`):
                Shape `(members,)` or `(members, prompts)`; NaN where a completion does not count.
            members_per_prompt (`int`, *optional*):
                How many members have the same prompts: those that follow each other. If `None`, all of them; see
                [`fitness.utilities`].

        Returns:
            `np.ndarray`: the utilities, of shape `(members,)`.

        Raises:
            `ValueError`: If there are not as many rewards as members.
        """
        if len(rewards) != len(population):
            raise ValueError(
                f"Rewards were told for {len(rewards)} members, but the population has {len(population)}."
            )
        values = utilities(np.asarray(rewards, dtype=np.float64), self.fitness_shaping, members_per_prompt)
        self.update_record = UpdateRecord(
            [member.seed for member in population], [member.sign for member in population], values.tolist()
        )
        return values

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """
        Move the weights by what was told, and forget it. Nothing moves if all utilities are zero.

        Raises:
            `RuntimeError`: If nothing was told since the last step.
        """
        seeds, coefficients = self._coefficients()
        self.weights.to_working_dtype()
        self.restore()
        self.update_norm = 0.0
        if seeds:
            norms = to_host(self._update(seeds, coefficients))
            self.update_norm = math.sqrt(math.fsum(norm**2 for norm in norms))
            self.moves += 1
        self.updates += 1
        self.update_record = None

    @contextlib.contextmanager
    def previewed(self, step_scale: float) -> Iterator[None]:
        """
        Inside, the model computes with the weights that the next step would give with this `step_scale`. It is not
        done: nothing is kept of it, and it needs no memory.

        Raises:
            `RuntimeError`: If nothing was told since the last step, or there are no masters to come back to.
        """
        if self.weights.drifts:
            raise RuntimeError("A step can be previewed with master weights only.")
        seeds, coefficients = self._coefficients()
        self.weights.to_working_dtype()
        self.restore()
        kept, self.step_scale = self.step_scale, step_scale
        try:
            with torch.no_grad():
                self._update(seeds, coefficients, keep=False)
            yield
        finally:
            self.step_scale = kept
            self.weights.refresh()

    def _coefficients(self) -> tuple[list[int], list[float]]:
        """Seeds and factors of g, without those that are zero."""
        if self.update_record is None:
            raise RuntimeError(
                "A step needs fitness: call ask(), evaluate the members and tell() their rewards first."
            )
        factors = {seed: factor for seed, factor in self.update_record.coefficients().items() if factor != 0.0}
        return list(factors), list(factors.values())

    def _update(self, seeds: list[int], coefficients: list[float], keep: bool = True) -> list[torch.Tensor]:
        """Update all weights, or only the working ones; returns the norms of the pieces' updates."""
        shards = {shard.parameter: shard for shard in self.weights.shards}
        norms = []
        for group in self.param_groups:
            for parameter in group["params"]:
                shard = shards[parameter]
                with shard.rewritten() as working:
                    for start, stop, g in self.weights.weighted_sums(shard, seeds, coefficients):
                        update = functools.partial(self._update_piece, shard, working, g, group, keep, start)
                        pieces = noise.for_pieces(update, stop - start, working.device)
                        if not shard.part.replica:
                            norms += pieces
        return norms

    def _update_piece(
        self,
        shard: Shard,
        working: torch.Tensor,
        g: Sum,
        group: dict[str, Any],
        keep: bool,
        offset: int,
        low: int,
        high: int,
    ) -> torch.Tensor:
        lr = group["lr"] * self.step_scale
        low, high = offset + low, offset + high
        piece = slice(low, high)
        device = working.device
        state = self.state[shard.parameter]
        weights = shard.trained[piece].to(device, torch.float32, copy=not keep)
        averages = [state[key][piece].to(device, copy=not keep) for key in self._rule.averages]

        delta = noise.scratch(weights.numel(), device)
        g.add(None, delta, low)
        self._rule.ascend(delta, averages, self.moves + 1)
        if group["weight_decay"] > 0:
            delta.sub_(weights, alpha=group["weight_decay"])
        if self.anchor_decay > 0:
            pull = weights - self._anchor(shard, low, high).float()
            if self.anchor_penalty == "l1":  # the step of soft thresholding, which ends at the anchor
                pull.div_(max(lr * self.anchor_decay, TINY)).clamp_(-1.0, 1.0)
            delta.sub_(pull, alpha=self.anchor_decay)
        delta.mul_(lr)

        weights.add_(delta)
        working[piece].copy_(weights)
        if keep:
            # Both are no-ops where `to` returned the tensor itself
            _write_back(shard.trained[piece], weights)
            for key, average in zip(self._rule.averages, averages, strict=True):
                _write_back(state[key][piece], average)
        return torch.linalg.vector_norm(delta)

    def distance_from_start(self) -> float:
        """
        Euclidean distance between the weights and those that the optimizer was made with.

        Measured on every k-th weight and scaled up, with k = 1 up to 2**21 weights: noise spreads the distance evenly
        over the weights, so the error is about 0.1 %. Of partitioned parameters, it is the distance of this process's
        parts.
        """
        return self._norm_by_samples(lambda shard, sample: sample - self.state[shard.parameter]["start"].float())

    def weight_norm(self) -> float:
        """Euclidean norm of the weights, measured like the distance."""
        return self._norm_by_samples(lambda shard, sample: sample)

    def _norm_by_samples(self, vector: Callable[[Shard, torch.Tensor], torch.Tensor]) -> float:
        """Norm of what a function makes of each shard's sample, scaled up to all weights."""
        sampled = [
            (shard.part.numel, vector(shard, self._sample(shard).float()))
            for shard in self.weights.shards
            if not shard.part.replica
        ]
        sampled = [(numel, values) for numel, values in sampled if values.numel()]
        norms = to_host([torch.linalg.vector_norm(values) for _, values in sampled])
        squares = [norm**2 * numel / len(values) for norm, (numel, values) in zip(norms, sampled, strict=True)]
        return math.sqrt(math.fsum(squares))

    # ---- state ----

    def facts(self) -> dict[str, Any]:
        """What a resumed run needs beside tensors: numbers that JSON can hold."""
        return {
            "updates": self.updates,
            "moves": self.moves,
            "stride": self._stride,
            "reads_anchor": self._reads_anchor,
            "step_scale": self.step_scale,
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
        }

    def slices(self) -> dict[str, Slice]:
        """This process's slices of the trained weights and of all that is kept about them, which are not copied."""
        slices = {}
        for shard in self.weights.shards:
            state = self.state[shard.parameter]
            for key, values in {"weights": shard.trained, **state}.items():
                slices[f"{shard.name}/{key}"] = Slice(shard.part, values)
            # A slice of the sample is no slice of the parameter: it goes by the part that it is of
            start = slices.pop(f"{shard.name}/start").values
            slices[_sample_key(shard.part)] = Slice(Part.whole(shard.name, start.shape), start)
        return slices

    def state_dict(self) -> dict[str, Any]:
        """
        Everything that a resumed run needs, the trained weights included; tensors are not copied. Of partitioned
        parameters it has this process's parts.
        """
        slices = {
            key: (tuple(part.shape), part.offset, part.length, part.period, values)
            for key, (part, values) in self.slices().items()
        }
        return {**self.facts(), "slices": slices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state made by [`~EvolutionStrategy.state_dict`] into this optimizer and the model."""
        self.load_parts([state_dict])

    def load_parts(self, parts: Sequence[dict[str, Any]]) -> None:
        """
        Copy a state into this optimizer and the model.

        Args:
            parts (`Sequence[dict[str, Any]]`):
                What [`~EvolutionStrategy.state_dict`] returned on each process, however many those were.

        Raises:
            `ValueError`: If the state is of other parameters or of another `rule` or `anchor_decay`.
        """
        slices: dict[str, list[Slice]] = {}
        for part in parts:
            for key, (shape, offset, length, period, values) in part["slices"].items():
                name = key.split("/")[0]
                slices.setdefault(key, []).append(Slice(Part(name, torch.Size(shape), offset, length, period), values))
        self.load(parts[0], StateDicts(slices))

    @torch.no_grad()
    def load(self, facts: dict[str, Any], reader: StorageReader) -> None:
        """
        Copy a state into this optimizer and the model.

        Args:
            facts (`dict[str, Any]`):
                What [`~EvolutionStrategy.facts`] returned.
            reader (`StorageReader`):
                Has what [`~EvolutionStrategy.slices`] returned on each process, however many those were.

        Raises:
            `ValueError`: If the state is of other parameters or of another `rule` or `anchor_decay`, or if it has no
                initial weights, and those of its run are others than this optimizer was made with.
        """
        self.weights.to_working_dtype()
        self.restore()
        # States that do not say it are of a time when it was the spacing
        self._sample_every(facts.get("stride", _spacing(shard.shape for shard in self.weights.shards)))
        saved = reader.read_metadata().state_dict_metadata
        # Initial weights that are not saved, or not kept, are those that the optimizer was made with
        is_anchor_given = self._reads_anchor or (self.anchor_decay > 0 and facts.get("reads_anchor", False))
        others = ("start", "anchor") if is_anchor_given else ("start",)
        slices = {key: own for key, own in self.slices().items() if _kind(key) not in others}
        known = {own.part.name for own in slices.values()}
        samples = {}
        for key, found in saved.items():
            name = key.split("/")[0]
            if _kind(key) == "start":
                values = torch.empty(found.size, dtype=found.properties.dtype, device="cpu")
                samples[key] = Slice(Part.whole(name, found.size), values)
            elif name in known and key not in slices and _kind(key) not in others:
                raise ValueError(_misfit(key, "this run does not keep"))
        try:
            load({**slices, **samples}, reader)
        except LookupError as error:
            raise ValueError(_misfit(*error.args)) from error
        self._take_samples(samples, is_anchor_given)
        for group, loaded in zip(self.param_groups, facts["param_groups"], strict=True):
            group.update(loaded)
        self.updates = facts["updates"]
        self.moves = facts.get("moves", self.updates)  # states had no such number once
        self.step_scale = facts.get("step_scale", 1.0)
        self.weights.refresh()

    def _take_samples(self, samples: dict[str, Slice], is_anchor_given: bool) -> None:
        """
        Put the samples of the weights at the start together, and take what is of this process's parts of them. They
        must be those that the optimizer was made with if its anchor is.
        """
        for shard in self.weights.shards:
            _, own = shard.part.sample(self._stride)
            size = -(-shard.shape.numel() // self._stride)
            whole = torch.full((size,), math.nan, dtype=shard.trained.dtype, device="cpu")
            keys = [key for key, slice_ in samples.items() if slice_.part.name == shard.name]
            for key in keys:
                part = Part(shard.name, shard.shape, *map(int, key.split("/")[2:]))
                whole[part.sample(self._stride)[1]] = samples[key].values.to(whole.dtype)
            if keys:  # states of columns had another sample once; the distance then counts from the model as given
                start, saved = self.state[shard.parameter]["start"], whole[own]
                if is_anchor_given and not torch.equal(start.cpu(), saved):
                    raise ValueError(
                        "`anchor_weights='model'`, here or in the run of the checkpoint, takes the initial weights "
                        f"from `model`, but those of `{shard.name}` are others than the run began with. Give the "
                        "model that the run began with."
                    )
                start.copy_(saved)


def _sample_key(part: Part) -> str:
    return f"{part.name}/start/{part.offset}/{part.length}/{part.period}"


def _kind(key: str) -> str:
    return key.split("/")[1]


def _spacing(shapes: Iterable[torch.Size]) -> int:
    """From how many of the parameters' weights one is taken for a sample of them."""
    return max(1, sum(shape.numel() for shape in shapes) // DISTANCE_SAMPLE)


def _stride(shapes: Sequence[torch.Size]) -> int:
    """
    Which weights make a sample: every k-th.

    All weights of a column share a factor of low-rank noise, so all columns of a matrix have to be met equally often:
    k has no divisor in common with their number.
    """
    stride, columns = _spacing(shapes), math.lcm(*(shape[-1] for shape in shapes if len(shape) >= 2))
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return stride


def _misfit(key: str, problem: str) -> str:
    name, kind, *_ = key.split("/")
    return (
        f"The optimizer state does not fit: for parameter {name!r}, {problem} {kind!r}. Resume with the model and the "
        "es_optimizer it was saved with."
    )


def _write_back(place: torch.Tensor, values: torch.Tensor) -> None:
    if place.data_ptr() != values.data_ptr():
        place.copy_(values)
