"""Completions by vLLM in this process, with the weights that are trained."""

import contextlib
import functools
import itertools
import os
import socket
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import ESConfig
from ..rollout import Completion
from ..run.history import run_config, working_dtype
from ..run.processes import Processes
from ..text_only import other_modalities
from ..weights.layouts import EngineWeights
from .base import Engine
from .decoding import Row
from .image_prompts import ImagePrompt
from .live_weights import PROBE_SAMPLING, overwritten
from .vllm_prompts import generate, has_processor
from .vllm_requests import VLLMRequests
from .vllm_sampling import common_seed, sampling_options, sampling_params
from .vllm_weights import check_values, require_seen_weights, require_used_weights


if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest


WORKER_EXTENSION = "es_trainer.engines.vllm_worker.WorkerExtension"

# Keyword arguments of `from_pretrained` with which vLLM loads the same model by its name
LOADABLE = {"dtype", "revision", "trust_remote_code", "attn_implementation"}


class VLLMEngine(Engine):
    """
    Generates with vLLM in this process, or in this and those of its tensor-parallel group together.

    The engine's weights are the working weights: `engine_weights` says where the parameters are, and who changes them
    has only to change them there.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, in host memory.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer, or its processor.
        args ([`ESConfig`]):
            Generation parameters, and those that begin with `vllm_`.
        source (`str`, *optional*):
            Name or folder of the model, if it was loaded from there.
        processes ([`Processes`]):
            Those of the run. All of them make an engine together.

    Raises:
        [`LoadError`]: If vLLM does not hold the model's weights as they are.
    """

    reads_images = True

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: ESConfig,
        source: str | None,
        processes: Processes,
    ):
        super().__init__(model, processing_class, args)
        self.group = processes.rank // args.vllm_tensor_parallel_size
        self.sampling = sampling_options(args, self.eos_token_ids)
        self.max_new_tokens = self.sampling["max_tokens"]
        self._sleeping = False
        self._cache_salts = itertools.count()  # a salt of vLLM's prefix cache for each call
        if not LOADABLE.issuperset(args.model_init_kwargs or {}):
            source = None
        if source is not None and not has_processor(source, processing_class, args):
            source = None
        with _shared_folder(processes) as (folder, writes):
            if writes:
                processing_class.save_pretrained(folder)
                model.config.save_pretrained(folder)  # by which vLLM knows what kind of tokenizer it is
                if source is None:
                    model.save_pretrained(folder)
            processes.barrier()
            self.llm = self._start(source or str(folder), str(folder), args, processes)
            processes.barrier()
        processes.before_leaving(functools.partial(_shut_down, weakref.ref(self.llm)))
        if args.vllm_enable_sleep_mode:
            self._sleep()
        self.context = self.llm.llm_engine.model_config.max_model_len

    def _start(self, source: str, tokenizer: str, args: ESConfig, processes: Processes) -> "LLM":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        from . import vllm_worker  # noqa: F401 (some of what it prepares is needed before the engine starts)

        model_options = args.model_init_kwargs or {}
        return LLM(
            model=source,
            tokenizer=tokenizer,
            revision=model_options.get("revision") if source != tokenizer else None,
            trust_remote_code=args.trust_remote_code or model_options.get("trust_remote_code", False),
            dtype=str(self._dtype(args)).removeprefix("torch."),
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_len=args.vllm_max_model_length,
            model_impl=args.vllm_model_impl,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            worker_extension_cls=WORKER_EXTENSION,
            # Compilation takes minutes on CPU, and saves nothing there
            enforce_eager=args.device.type == "cpu",
            **self._options(args, processes),
        )

    def _dtype(self, args: ESConfig) -> Any:
        """What vLLM computes in."""
        return working_dtype(run_config(args)) or self.model.dtype

    def _options(self, args: ESConfig, processes: Processes) -> dict[str, Any]:
        """Further options of vLLM."""
        options: dict[str, Any] = {}
        if args.generation_batch_size is not None:
            options["max_num_seqs"] = args.generation_batch_size
        if processes.count > 1:
            options["distributed_executor_backend"] = "external_launcher"
        return options

    def engine_weights(self, image_prompt: ImagePrompt | None = None) -> dict[nn.Parameter, EngineWeights]:
        """
        Where the engine keeps the parameters of the model, and computes with those that are trained.

        Args:
            image_prompt ([`ImagePrompt`], *optional*):
                One of the prompts to train on, if they have images.
        """
        parameters = dict(self.model.named_parameters())
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        (found,) = self.llm.collective_rpc("engine_weights", args=(shapes, frozen))
        check_values(found, parameters)
        self._check_weights_are_used(
            {name: own for name, own in found.items() if parameters[name].requires_grad}, image_prompt
        )
        # Of the groups of processes, which all have all of the weights, the first stands for the others in sums
        return {
            parameters[name]: replace(own, part=replace(own.part, replica=own.part.replica or self.group > 0))
            for name, own in found.items()
        }

    def _check_weights_are_used(
        self, engine_weights: dict[str, EngineWeights], image_prompt: ImagePrompt | None
    ) -> None:
        def changed(name: str) -> contextlib.AbstractContextManager[None]:
            return overwritten(engine_weights[name].weights)

        ask = functools.partial(logprobs, self.llm)
        of_images = set(other_modalities(self.model))
        read, seen = ([name for name in engine_weights if (name in of_images) == x] for x in (False, True))
        with self.woken_up():
            require_used_weights(read, changed, ask, self.tokenizer, self.context)
            if image_prompt is not None:
                require_seen_weights(seen, changed, lambda: ask(image_prompt, 1, uuid.uuid4().hex))

    def reset_prefix_cache(self) -> None:
        """
        Empty the prefix cache, for code that uses `llm` directly.

        Raises:
            `RuntimeError`: If vLLM does not empty it, because requests are under way.
        """
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not empty its prefix cache, because it holds keys and values of requests that have not "
                "ended: the next member would be evaluated with those of another one. A `rollout_func` has to wait "
                "for all requests that it gives to `trainer.engine.llm`."
            )

    @contextlib.contextmanager
    def woken_up(self) -> Iterator[None]:
        if not self._sleeping:
            yield
            return
        self.llm.wake_up(tags=["kv_cache"])
        self._sleeping = False
        try:
            yield
        finally:
            self._sleep()

    def _sleep(self) -> None:
        """Give back the memory of the KV cache. The weights stay awake, as they are updated meanwhile."""
        self.llm.sleep(level=1)
        self.llm.wake_up(tags=["weights"])
        self._sleeping = True

    def complete(
        self,
        ids: list[list[int]],
        rows: list[Row],
        seed: int,
        members: "Sequence[LoRARequest] | None" = None,
        batch_size: int | None = None,
        progress: bool = False,
        caches: dict[str, str] | None = None,
    ) -> list[Completion]:
        """
        Complete rows that have a text of their own each; see [`TransformersEngine.complete`].

        Args:
            caches (`dict[str, str]`, *optional*):
                What calls for earlier turns with the same weights have left here: the salt of vLLM's prefix cache.
        """
        samples = self.sampling["temperature"] > 0
        seeds = [common_seed(seed, row.prompt, row.number) if samples else None for row in rows]
        # The weights may have changed since the last call, whose keys and values have another salt
        salt = str(next(self._cache_salts))
        if caches is not None:
            salt = caches.setdefault("salt", salt)
        adapters = self._adapters(members)
        with self.woken_up():
            outputs = generate(
                self.llm,
                ids,
                salt,
                [sampling_params(self.sampling, seed) for seed in seeds],
                lora_request=[adapters[row.member] for row in rows],
                use_tqdm=functools.partial(tqdm, leave=False, position=2, dynamic_ncols=True) if progress else False,
            )
        completions = [output.outputs[0] for output in outputs]
        return [self._completion(list(made.token_ids), made.finish_reason == "length") for made in completions]

    def requests(self, members: "Sequence[LoRARequest] | None", most_rows: int | None = None) -> VLLMRequests:
        """
        Requests that are answered as they come; see [`TransformersEngine.requests`].

        Args:
            members (`list[LoRARequest]`, *optional*):
                Adapters of the members.
            most_rows (`int`, *optional*):
                Without effect: vLLM chooses batches by itself, up to `max_num_seqs`.
        """
        adapters, salt = self._adapters(members), str(next(self._cache_salts))
        return VLLMRequests(self.llm, self.tokenizer, self.sampling, adapters, salt)

    def _adapters(self, members: "Sequence[LoRARequest | None] | None") -> "Sequence[LoRARequest | None]":
        """The adapters of members, or of the weights as they are."""
        return [self.unperturbed()] if members is None else members

    def unperturbed(self) -> "LoRARequest | None":
        """The adapter of the unperturbed weights; `None` if they are those of the engine."""
        return None


def logprobs(
    llm: "LLM", prompt: list[int], tokens: int, salt: str, adapter: "LoRARequest | None" = None
) -> list[float]:
    """The highest log probabilities of tokens after a prompt, with a salt in vLLM's prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(**PROBE_SAMPLING, max_tokens=tokens, detokenize=False)
    (output,) = generate(llm, [prompt], salt, params, lora_request=adapter, use_tqdm=False)
    return [best.logprob for token in output.outputs[0].logprobs for best in token.values()]


def _shut_down(reference: "weakref.ref[LLM]") -> None:
    # Its own end comes after that of the process groups which it uses
    if (llm := reference()) is not None:
        llm.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def _shared_folder(processes: Processes) -> Iterator[tuple[Path, bool]]:
    """A folder that the processes of this machine share for a while, and whether this one is to write into it."""
    writes = int(os.environ.get("LOCAL_RANK", 0)) == 0
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(tempfile.TemporaryDirectory(prefix="es_trainer-")) if writes else None
        replies = processes.exchange(lambda: (socket.gethostname(), mine))
        folders = {host: folder for host, folder in replies if folder is not None}
        yield Path(folders[socket.gethostname()]), writes
