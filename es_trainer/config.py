import json
import math
import os
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints

import torch
from accelerate.utils import parse_flag_from_env
from transformers import GenerationConfig, SchedulerType, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import GRPOConfig

from . import deepspeed_config
from .choices import (
    Aggregation,
    AnchorPenalty,
    AnchorWeights,
    FitnessShaping,
    LogFormat,
    MasterWeights,
    PerturbationName,
    Rule,
    SigmaSchedule,
    WeightQuantization,
    completions_needed,
    is_generation_reward,
    shaping_problem,
)
from .fields import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    REFUSED,
    GRPOFields,
    Needs,
    about,
    asks_for_something,
    at_least_1_or_none,
    by_steps,
    default,
    known_of,
    listing,
    one_of,
    require,
    was_set,
    without_effect,
)
from .schedules import as_schedule, largest_of, value_after
from .values import InSigmas, converted, in_sigmas, plain, with_schemas


logger = logging.get_logger(__name__)

# Together they say how many prompts GRPO takes in a step
GRPO_BATCH = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
}
SCHEDULES = ("population_size_schedule", "num_prompts_per_step_schedule")  # which have a form of their own
DEFAULT_PROMPTS = 8
DEFAULT_SAVE_STEPS = 50
# What GRPOConfig itself makes of fields that were left alone
GRPO_FILLED_IN = {"activation_checkpointing": (True, False), "pad_to_multiple_of": (None,), "bf16": (True,)}
LEAST_LEARNING_RATE = 1e-5  # a lower one is GRPO's

# Beside which other settings fields have an effect
LOW_RANK: Needs = (lambda c: c.perturbation == "low_rank"), "perturbation='low_rank'"
SAMPLED: Needs = (lambda c: c.samples), "temperature > 0"
ANCHORED: Needs = (lambda c: c.anchor_decay > 0), "anchor_decay > 0"
AUTO_STEP: Needs = (lambda c: c.auto_step > 0), "auto_step > 0"
SIGMA_FALLS: Needs = (lambda c: c.sigma_schedule != "constant"), "sigma_schedule='linear' or 'cosine'"
SEVERAL_GENERATIONS: Needs = (lambda c: c.num_generations > 1), "num_generations > 1"
LOGGED: Needs = (lambda c: c.log_completions), "log_completions=True"
LOGGING_BY_STEPS: Needs = (lambda c: c.logging_strategy == "steps"), "logging_strategy='steps'"
SAVING_BY_STEPS: Needs = (lambda c: c.save_strategy == "steps"), "save_strategy='steps'"
ZERO3: Needs = (lambda c: c.deepspeed_plugin is not None), "DeepSpeed ZeRO-3"
VLLM: Needs = (lambda c: c.use_vllm), "use_vllm=True"
COLOCATED: Needs = (lambda c: c.use_vllm and not c.on_servers), "use_vllm=True and vllm_mode='colocate'"
SERVERS: Needs = (lambda c: c.on_servers), "use_vllm=True and vllm_mode='server'"
NO_SERVERS: Needs = (lambda c: not c.on_servers), "vllm_mode='colocate', or no vLLM"
ONE_SERVER: Needs = (
    lambda c: c.on_servers and c.vllm_server_base_url is None,
    "use_vllm=True and vllm_mode='server', without vllm_server_base_url",
)

ALREADY_SAID: list[tuple[str, Any]] = []  # settings without what they need that were in a warning


class Derived(int):
    """A number that was made of other fields: in a copy with changes, it gives way to what is set there."""

    def __reduce__(self):
        return Derived, (int(self),)


@dataclass
class ESConfig(GRPOFields, TrainingArguments):
    r"""
    Configuration class for the [`ESTrainer`].

    This class includes only the parameters that are specific to evolution strategies (ES). For a full list of
    training arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values
    in this class may differ from those in [`~transformers.TrainingArguments`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the evolution strategy

        population_size (`int`, *optional*, defaults to `30`):
            Members (perturbed models) evaluated per step; N in [the paper](https://huggingface.co/papers/2509.24372).
        population_size_schedule (`str` or `dict[int, int]`, *optional*):
            Other sizes of the population, by the number of steps after which they begin: with `{50: 16, 100: 32}`,
            the first 50 steps have `population_size` members, the next 50 steps 16, and all later ones 32. The text
            of such a dict means the same. The learning rate has a schedule of its own (`lr_scheduler_type`).
        sigma (`float`, *optional*, defaults to `1e-3`):
            Standard deviation of the noise added to every weight.
        sigma_schedule (`str`, *optional*, defaults to `"constant"`):
            How sigma changes over the steps: `"constant"`, or `"linear"` or `"cosine"` down to `sigma_min_ratio *
            sigma`. The learning rate has a schedule of its own (`lr_scheduler_type`). One that is given in units of
            sigma, like `learning_rate="sigma/2"`, follows both.
        sigma_min_ratio (`float`, *optional*, defaults to `0.1`):
            Sigma after the last step, as a part of `sigma`.
        antithetic (`bool`, *optional*, defaults to `False`):
            Mirrored sampling: draw half as many noises and evaluate each with both signs. Needs an even
            `population_size`.
        num_steps_per_population (`int`, *optional*, defaults to `1`):
            Steps that evaluate the same noises, each on new prompts (reuse of noise, as in
            [EGGROLL](https://huggingface.co/papers/2511.16652)). It shows whether the same members win on other
            prompts: `update_cosine` is logged then. It saves no time, as noise is made anew whenever a member is
            evaluated, and learned no faster where it was measured (docs/tuning.md). Updates along the same noises
            add up instead of being orthogonal, so the learning rate of a population is so many times as large: divide
            `learning_rate` by as much to keep it.
        perturbation (`str`, *optional*, defaults to `"gaussian"`):
            Shape of the noise:

            - `"gaussian"`: every weight gets its own normal (the paper).
            - `"low_rank"`: matrices get A B^T / sqrt(rank) with normal A and B, everything else its own normals
              ([EGGROLL](https://huggingface.co/papers/2511.16652)). Members share the weights and are generated with
              in one batch, which is many times faster; the expected update is the same.
        perturbation_rank (`int`, *optional*, defaults to `1`):
            Rank of a member's low-rank noise. The update has up to rank `perturbation_rank * population_size`.
        population_batch_size (`int`, *optional*):
            Members evaluated together, in one batch. It changes speed and memory; results change only where the
            rounding of another batch size makes a different token the most likely one. If `None`, as many as fit into
            free memory, but one for `perturbation="gaussian"` on CPU: there a batch needs a copy of the weights for
            each member, which pays on GPUs only. It is one for beam search, too. A model that uses a parameter in an
            unknown way has its members evaluated one at a time, with a warning that names the module.
        fitness_shaping (`str`, *optional*, defaults to `"z_score"`):
            How the members' rewards become the weights of their noises:

            - `"z_score"`: mean reward minus the population's mean, divided by its standard deviation (the paper).
            - `"centered_rank"`: rank of the mean reward, spread over [-0.5, 0.5]; ignores outliers.
            - `"prompt_z_score"`: z-score of each prompt's reward over the population, then the mean over the prompts;
              easy and hard prompts weigh the same.
            - `"prompt_centered"`: each prompt's reward minus its mean over the population, divided by one standard
              deviation of all these differences, then the mean over the prompts (EGGROLL).
            - `"none"`: mean reward minus the population's mean.

            Where some of the rewards do not count (`None`, `mask_truncated_completions`), a member is compared with
            the members that have the same prompts. One with less than half of the prompts weighs like an average one.
        master_weights (`str`, *optional*, defaults to `"device"`):
            Where the float32 weights are from which the perturbed ones are written:

            - `"device"`: beside the working weights. Evaluations leave the weights bit-identical.
            - `"host"`: in host memory (pinned); saves 4 bytes a weight on the device for one transfer per member.
            - `"none"`: nowhere; noise is added to the working weights and subtracted again, as in the paper's code.
              Least memory, but every member leaves a rounding error in the weights, and updates smaller than half a
              unit in the last place are lost (docs/memory.md says what that amounts to).
        weight_quantization (`str`, *optional*):
            How the weights are stored that the members of `perturbation="low_rank"` share: `"int8"` or `"fp8"` (e4m3),
            with a scale for each row, of the matrices of linear layers and embeddings. They take 1 byte a weight on
            the device. Members add their terms in the working dtype (`bf16`), updates go to the float32 masters, and
            the matrices are quantized anew after each. Use it with `master_weights="host"`. `save_model` saves the
            masters' weights. If `None`, weights are in the working dtype.
        es_optimizer (`str`, *optional*, defaults to `"sgd"`):
            - `"sgd"`: weights += learning_rate / N * sum(utility * noise) (the paper).
            - `"momentum"`: heavy-ball momentum with decay `adam_beta1`. Keeps 4 more bytes a weight.
            - `"adam"`: Adam with `adam_beta1`, `adam_beta2` and `adam_epsilon`. Keeps 8 more bytes a weight.
        anchor_decay (`float`, *optional*, defaults to `0.0`):
            Decay towards the initial weights, against drifting away from what the model could do before: Anchored
            Weight Decay ([paper](https://huggingface.co/papers/2605.30148)), weights -=
            learning_rate * anchor_decay * (weights - initial weights). `0.03 / learning_rate`, by which each step
            takes back 3 % of the way, is strong already (docs/monitoring.md).
        anchor_penalty (`str`, *optional*, defaults to `"l2"`):
            `"l2"` is the decay above. With `"l1"`, each weight moves by `learning_rate * anchor_decay` towards its
            initial value and not beyond it, so that many weights stay where they began.
        anchor_weights (`str`, *optional*, defaults to `"device"`):
            Where the initial weights are that `anchor_decay` pulls to. It changes no bit of the updates, and a run
            may be resumed with another value:

            - `"device"`: a copy beside the masters, or beside the working weights if there are none, in the dtype in
              which the model was loaded.
            - `"host"`: a copy in host memory (pinned); saves its bytes on the device for one transfer per step.
            - `"model"`: no copy. Each step reads the safetensors files that `model` was loaded from, which must stay
              as they are. For a model that is given by its name or folder, without an adapter, whose parameters have
              the same names and shapes in the files (not so for mixtures of experts, which Transformers merges into
              one tensor). Checkpoints have no copy either, so the run must be resumed with the same `model`.

            With `vllm_mode="server"`, the only value is `"device"`.
        evaluate_center (`bool`, *optional*, defaults to `True`):
            Evaluate the unperturbed weights on the prompts of each step, too, like one more member. What the update
            did and what sigma costs is logged then (`reward/center`, `gain`, `sigma_cost`). The update does not depend
            on it.
        auto_step (`int`, *optional*, defaults to `0`):
            Every so many steps, from the first one on, the update is tried at 1/2, 1 and 2 times its length: the
            weights that it would give answer `auto_step_prompts` held-out prompts, and this and the following updates
            have the length that is best (`step_scale`, from 1/16 to 16). It costs four evaluations of these prompts
            and no memory. `0` leaves updates as long as the learning rate says. Needs an `eval_dataset` and master
            weights; not with `vllm_mode="server"`. See docs/tuning.md.
        auto_step_prompts (`int`, *optional*, defaults to `32`):
            Number of held-out prompts: the first ones of the `eval_dataset`, or of the first of several.
        skip_settled_prompts (`float`, *optional*, defaults to `0.0`):
            Probability of passing over a prompt on which all members had the same reward when it was drawn last: it
            does not tell members apart. An epoch has as many prompts as before; where some are passed over, others are
            drawn again. 0 draws all as often; it must be less than 1.
        num_prompts_per_step_schedule (`str` or `dict[int, int]`, *optional*):
            Other numbers of prompts, as in `population_size_schedule`. The largest of them is drawn for each step, and
            a step that has fewer passes over the others, which come again in a later epoch. An epoch has as many steps
            as with the largest number.
        unique_prompts (`bool`, *optional*, defaults to `False`):
            Every member answers `num_prompts_per_step` prompts of its own instead of the same ones as all others (as
            [EGGROLL](https://huggingface.co/papers/2511.16652) does), so a step sees so many times as much of the
            dataset for as many completions. With `antithetic`, both members of a pair answer the same prompts, and
            are compared on them: how easy these are does not count. Without, luck with easy prompts counts like merit.
            A step takes its rows in the order of the members; where there are fewer, as at the end of an epoch, each
            member has fewer of them, and the first rows are taken again for what is missing. The unperturbed weights
            answer those of the first member. See docs/tuning.md.
        num_prompts_per_step (`int`, *optional*):
            Prompts that every member answers in a step, whatever the number of processes. If `None`, it is
            `per_device_train_batch_size * gradient_accumulation_steps`, which is 8 if neither is set. ES has no
            micro-batches: afterwards `per_device_train_batch_size` is the number of rows of a step, and
            `gradient_accumulation_steps` is 1.

        > Parameters that control several processes

        consistency_check_steps (`int`, *optional*, defaults to `50`):
            Every so many steps, and before each checkpoint, a checksum of the weights is compared across processes
            that all hold them.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            With DeepSpeed ZeRO-3, gather the weights for generation: once a step, after which each process evaluates
            members of its own. The weights have to fit into one device then. If `False`, all processes evaluate the
            same member, each on its share of the prompts, and weights are gathered module by module: for models that
            do not fit, and many times slower.

        > Parameters that control the model

        model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the `model`
            argument of the [`ESTrainer`] is provided as a string. `torch_dtype`, the older name of `dtype`, means the
            same.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow models and tokenizers that are defined by code in their own repository.

        > Parameters that control the data preprocessing

        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Whether to only keep the column `"prompt"` in the dataset. If you use a reward function that requires any
            other column, keep this `False`.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the training dataset; an iterable one in a buffer of 1000 rows.

        > Parameters that control generation

        max_completion_length (`int`, *optional*, defaults to `512`):
            Maximum length of the generated completion, in tokens.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt and member. With greedy decoding they would be equal, so 1 is taken then.
        num_generations_eval (`int`, *optional*):
            Completions per prompt in evaluations. If `None`, it is `num_generations`.
        generation_batch_size (`int`, *optional*):
            Most sequences generated at once. If `None`, all of the members evaluated together.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature for sampling; `0.0` is greedy decoding, as in the paper. With sampling, the random numbers
            are common to all members: the draw for a token depends only on step, prompt, completion and position, so
            that members differ in fitness by their weights and not by luck.
        top_p (`float`, *optional*, defaults to `1.0`):
            Cumulative probability of the top tokens to consider when sampling. Must be in (0, 1].
        top_k (`int`, *optional*, defaults to `0`):
            Number of highest probability tokens to keep when sampling. `0` keeps all.
        min_p (`float`, *optional*):
            Minimum token probability when sampling, scaled by the probability of the most likely token.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Penalty for tokens that occur in the prompt or in what was generated so far. Values above 1 encourage new
            tokens.
        generation_kwargs (`str` or `dict[str, Any]`, *optional*):
            Additional keyword arguments of [`~transformers.GenerationConfig`], such as `suppress_tokens` or
            `stop_strings`. They override the other generation parameters; `do_sample` has to agree with `temperature`.
            With `use_vllm=True`, those of vLLM's `SamplingParams`. Of the model's own generation config, what says
            which tokens may follow, where completions end and how they are computed is in effect; beams, sampling and
            forms of output are not.
        chat_template_kwargs (`str` or `dict[str, Any]`, *optional*):
            Additional keyword arguments of `apply_chat_template`. Functions among the `tools` are replaced by their
            schemas.
        max_tool_calling_iterations (`int`, *optional*):
            Most turns in which tools are called. If `None`, a rollout ends when the model calls none, or at
            `max_completion_length`, which holds for all turns and the results of the tools together.
        cache_implementation (`str`, *optional*):
            Implementation of the key-value cache, as in [`~transformers.GenerationConfig`].

        > Parameters of programs that ask the members for completions (`agent_func`)

        agent_concurrency (`int`, *optional*, defaults to `64`):
            Most programs that run at the same time in a process.
        agent_timeout (`float`, *optional*):
            Seconds after which a program is stopped. It then counts as one without a reward. If `None`, never.
        agent_errors (`str`, *optional*, defaults to `"raise"`):
            What happens if a program raises: `"raise"` ends training, `"none"` counts it as one without a reward.
        agent_port (`int`, *optional*, defaults to `0`):
            Port on 127.0.0.1 at which programs find their models; further processes take the next ones. 0 takes free
            ones.

        > Parameters that control generation with vLLM

        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to generate completions with vLLM. `generation_kwargs` are then those of vLLM's `SamplingParams`.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            - `"colocate"`: in the processes of the trainer. The engine's weights are the weights that are trained.
            - `"server"`: on servers, which are started with `es-trainer vllm-serve`. They hold, perturb and update the
              weights; the trainer, which is one process without a GPU, hands members to those that are free. With a
              `peft_config`, the trainer has the adapter and updates it, and the servers have the base model.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            Implementation of the model: vLLM's own (`"vllm"`) or that of Transformers (`"transformers"`).
        vllm_structured_outputs_regex (`str`, *optional*):
            Regular expression that completions have to match.
        vllm_lora (`bool`, *optional*, defaults to `False`):
            Evaluate the members as LoRA adapters of one batch, which is several times faster than one member after
            another where few prompts do not fill the device. Needs `perturbation="low_rank"`, and servers that were
            started with `--enable-lora`. Only what LoRA adapters can carry is trained, which are the matrices of the
            linear layers; embeddings, norms, biases and experts stay as they are, which is logged. With a
            `peft_config`, members are adapters without it.

        > Parameters that control vLLM with `vllm_mode="server"`

        vllm_server_base_url (`list[str]` or `str`, *optional*):
            Base URL of each server, like `"http://localhost:8000"`. If given, `vllm_server_host` and
            `vllm_server_port` are ignored. The token of the servers, if they have one, is read from the environment
            variable `VLLM_API_KEY`.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`):
            Host of the server.
        vllm_server_port (`int`, *optional*, defaults to `8000`):
            Port of the server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for servers to be up, and for the answer to any request: a server that needs longer for a
            member's completions counts as hung, and the member goes to another one.

        > Parameters that control vLLM with `vllm_mode="colocate"`

        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the device's memory for the engine, its weights included: as GRPOConfig's, though there is no
            second copy of the weights, no gradient and no optimizer state to leave room for. On CPU, of the machine's.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt with its completion, in tokens. If `None`, the model's.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Processes that share out each weight matrix and generate for the same member together. Must divide the
            number of processes.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Whether the engine frees its key-value cache between generations. Not on CPU.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function. Must match the number of reward functions. If `None`, all are 1.0.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How several reward functions become one reward:

            - `"sum_then_normalize"`: they are weighed and summed. One with a wide range counts more.
            - `"normalize_then_sum"`: each is brought to one scale first, by which the standard deviation of the
              members' fitness is 1. `reward` is logged as the weighted sum nevertheless.
        generation_reward (`str`, *optional*, defaults to `"mean"`):
            How the rewards of the `num_generations` completions of a prompt become the prompt's reward:

            - `"mean"`: their mean.
            - `"max"`: the best of them.
            - `"pass@k"`, for instance `"pass@4"`: the best of k of them, expected; of rewards that are 0 or 1, the
              unbiased [pass@k](https://huggingface.co/papers/2107.03374). Needs `num_generations >= k`.
            - `"majority"`: the reward of the answer that most of them give. `majority_key` of the [`ESTrainer`] says
              what the answer of a completion is.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Leave completions that did not end within `max_completion_length` out of the fitness.
        reward_workers (`int`, *optional*, defaults to `0`):
            Completions that are scored at the same time, in each process of the run. Reward functions are then called
            with one completion each: plain ones in a pool of as many processes, `async` ones in the event loop. Those
            that cannot be copied stay in the training process. If `0`, a function is called there with all
            completions of a member, as `GRPOTrainer` does. Rewards and their order do not depend on it.
        reward_timeout (`float`, *optional*):
            Seconds that a reward function may take for a completion, or for all of a member if it is
            [`~es_trainer.rewards.per_member`]. Then it is ended and does not apply, as if it returned `None`;
            [`~es_trainer.rewards.time_limit`] declares a limit of a function's own, and what counts instead. If
            `None`, it may take forever. Needs `reward_workers`.
        reward_retry_on (`list[str]`, *optional*):
            Exceptions of reward functions after which the function is called again, such as
            `["TimeoutError", "httpx.HTTPStatusError"]`. It waits in between: about 1, 2, 4, ... up to 60 seconds.
        reward_retries (`int`, *optional*, defaults to `5`):
            How often it is called again at most. Then the exception ends training.

        > Parameters that control the logging

        eval_kl_prompts (`int`, *optional*, defaults to `0`):
            Prompts of each evaluation dataset, the first ones, on which evaluations compare the model's next-token
            distributions with those of the weights that the run began with. The mean of KL(start || now) over their
            last 64 tokens each, in nats, is logged as `eval_kl`. The start's logits are kept in host memory. 0
            compares none.
        log_format (`str`, *optional*, defaults to `"line"`):
            What is printed of a log: `"line"`, the few numbers that say how the run does, or `"dict"`, all of them.
            Trackers get all of them in any case. Notebooks show a table.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to log prompts, completions and rewards of the step's best member every `logging_steps` steps:
            printed as a table, as Parquet files in `completions/` in the output folder, and to wandb, trackio and
            TensorBoard where `report_to` names them.
        log_multimodal (`bool`, *optional*, defaults to `True`):
            Whether the images of the prompts are in the Parquet files and on wandb and trackio, too.
        num_completions_to_print (`int`, *optional*):
            Number of completions to print. If `None`, all of the step's best member are printed.
        log_unique_prompts (`bool`, *optional*, defaults to `False`):
            Whether to log one completion of each prompt to the trackers instead of all.
        log_completions_hub_repo (`str`, *optional*):
            Dataset repository on the Hub to which the Parquet files are uploaded every two minutes. Needs
            `log_completions=True`.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `5e-4` instead of `5e-5`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`, as in the paper.
    > - `bf16`: Defaults to `True` if the device has bfloat16 (on CPU: AVX-512) and `fp16` is not set, instead of
    >   `False`. `bf16` and `fp16` choose the dtype of the working weights; there is no autocast. If both are `False`,
    >   the model keeps the dtype it was given in.
    > - `per_device_train_batch_size`: Defaults to `None`, which is 8; see `num_prompts_per_step`.
    > - `per_device_eval_batch_size`: Defaults to `64` instead of `8`. Fewer sequences are generated at once where
    >   memory does not suffice.
    > - `save_steps`: Defaults to `None`, which is 50, or with `load_best_model_at_end` the next multiple of
    >   `eval_steps`, instead of `500`.
    > - `logging_steps`: Defaults to `1` instead of `500`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    > - `use_cache`: Defaults to `True` instead of `False`.
    > - `ddp_backend`: Defaults to `"gloo"` on CPU.
    > - `use_cpu`: `True` on machines without an accelerator.

    > [!NOTE]
    > All fields of [`~trl.GRPOConfig`] are accepted. One warning lists those that were set and have no effect, with
    > what to use instead, also of [`~transformers.TrainingArguments`]; they are reset to their defaults.

    Raises:
        `ValueError`: If a value cannot work; names the field. Numbers that are text
            (`"1e-3"`, as YAML reads `1e-3`) and those of numpy count as the numbers that they are.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["generation_kwargs", "chat_template_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(
        default=5e-4,
        metadata=about(
            "The initial learning rate; the paper's alpha.",
            "run",
            valid=NOT_NEGATIVE,
            not_from_grpo="a learning rate of GRPO says nothing about one of ES",
        ),
    )
    bf16: bool | None = field(
        default=None,
        metadata=about(
            "Use bfloat16 working weights. If not set, it is `True` if the device has bfloat16 and `fp16` is not set.",
            "run",
        ),
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="constant",
        metadata=about("The learning rate scheduler type to use; the paper's is constant.", "processes"),
    )
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata=about("Prompts of a step, if `num_prompts_per_step` is not set. If `None`, 8.", "nobody"),
    )
    per_device_eval_batch_size: int = field(
        default=64,
        metadata=about(
            "Prompts of an evaluation that are answered together. Fewer sequences are generated at once if "
            "memory does not suffice.",
            "processes",
        ),
    )
    save_steps: float | None = field(
        default=None,
        metadata=about(
            "Save a checkpoint every X updates steps. Should be an integer or a float in range `[0,1)`. If "
            "smaller than 1, will be interpreted as ratio of total training steps. If `None`, it is 50, or with "
            "`load_best_model_at_end` the next multiple of `eval_steps`.",
            "processes",
            needs=SAVING_BY_STEPS,
        ),
    )
    logging_steps: float = field(
        default=1,
        metadata=about(
            "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps.",
            "processes",
            needs=LOGGING_BY_STEPS,
        ),
    )
    remove_unused_columns: bool | None = field(
        default=False,
        metadata=about(
            "Whether to only keep the column 'prompt' in the dataset. If you use a reward function that "
            "requires any other column, keep this `False`.",
            "nobody",
        ),
    )
    use_cache: bool = field(
        default=True, metadata=about("Whether the saved model's config enables the key-value cache.", "nobody")
    )

    # Parameters that control the evolution strategy
    population_size: int = field(
        default=30,
        metadata=about(
            "Members (perturbed models) evaluated per step.",
            "run",
            valid=((lambda size: size >= 2), "members are compared, so at least 2 are needed."),
        ),
    )
    population_size_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata=about(
            "Other sizes of the population, by the number of steps after which they begin: '{50: 16, 100: 32}'.",
            "run",
            valid=by_steps("sizes", least=2, first="population_size"),
        ),
    )
    sigma: float = field(
        default=1e-3,
        metadata=about(
            "Standard deviation of the noise added to every weight.",
            "run",
            valid=((lambda sigma: sigma > 0), "the noise needs a positive standard deviation; the paper uses 1e-3."),
        ),
    )
    sigma_schedule: str = field(
        default="constant",
        metadata=about(
            "How sigma changes over the steps: 'constant', 'linear' or 'cosine'.",
            "run",
            valid=one_of(get_args(SigmaSchedule)),
        ),
    )
    sigma_min_ratio: float = field(
        default=0.1,
        metadata=about(
            "Sigma after the last step, as a part of `sigma`.",
            "run",
            valid=((lambda ratio: 0 < ratio <= 1), "it must be in (0, 1]."),
            needs=SIGMA_FALLS,
        ),
    )
    antithetic: bool = field(
        default=False, metadata=about("Evaluate each noise with both signs. Needs an even `population_size`.", "run")
    )
    num_steps_per_population: int = field(
        default=1,
        metadata=about("Steps that evaluate the same noises, each on new prompts.", "run", valid=AT_LEAST_1),
    )
    perturbation: str = field(
        default="gaussian",
        metadata=about(
            "Shape of the noise: 'gaussian' (the paper's) or 'low_rank' (faster).",
            "run",
            valid=one_of(get_args(PerturbationName)),
        ),
    )
    perturbation_rank: int = field(
        default=1, metadata=about("Rank of a member's low-rank noise.", "run", valid=AT_LEAST_1, needs=LOW_RANK)
    )
    population_batch_size: int | None = field(
        default=None,
        metadata=about(
            "Members evaluated together. If `None`, as many as fit into memory (gaussian noise on CPU: 1).",
            "nobody",
            valid=at_least_1_or_none("as many as fit into memory"),
        ),
    )
    fitness_shaping: str = field(
        default="z_score",
        metadata=about(
            "Rewards to utilities: 'z_score', 'centered_rank', 'prompt_z_score', 'prompt_centered' or 'none'.",
            "run",
            valid=one_of(get_args(FitnessShaping)),
        ),
    )
    master_weights: str = field(
        default="device",
        metadata=about(
            "Where the float32 master weights are: 'device', 'host' or 'none' (in-place noise; drifts).",
            "run",
            valid=one_of(get_args(MasterWeights)),
        ),
    )
    weight_quantization: str | None = field(
        default=None,
        metadata=about(
            "Store the weights that members share in 8 bits: 'int8' or 'fp8'.",
            "run",
            valid=one_of((None, *get_args(WeightQuantization))),
        ),
    )
    es_optimizer: str = field(
        default="sgd",
        metadata=about("Update rule: 'sgd' (the paper's), 'momentum' or 'adam'.", "run", valid=one_of(get_args(Rule))),
    )
    anchor_decay: float = field(
        default=0.0, metadata=about("Decay towards the initial weights.", "run", valid=NOT_NEGATIVE)
    )
    anchor_penalty: str = field(
        default="l2",
        metadata=about(
            "Penalty of the distance from the initial weights: 'l2' or 'l1'.",
            "run",
            valid=one_of(get_args(AnchorPenalty)),
            needs=ANCHORED,
        ),
    )
    anchor_weights: str = field(
        default="device",
        metadata=about(
            "Where the initial weights are: 'device', 'host' or 'model' (read from its files at each step).",
            "processes",
            valid=one_of(get_args(AnchorWeights)),
            needs=ANCHORED,
        ),
    )
    evaluate_center: bool = field(
        default=True,
        metadata=about("Whether to evaluate the unperturbed weights on the prompts of each step, too.", "processes"),
    )
    auto_step: int = field(
        default=0,
        metadata=about(
            "Steps after which the update is tried at 1/2, 1 and 2 times its length on held-out prompts, and the best "
            "length is taken from there on. `0`: never.",
            "run",
            valid=NOT_NEGATIVE,
        ),
    )
    auto_step_prompts: int = field(
        default=32,
        metadata=about("Number of held-out prompts for it.", "processes", valid=AT_LEAST_1, needs=AUTO_STEP),
    )
    skip_settled_prompts: float = field(
        default=0.0,
        metadata=about(
            "Probability of passing over a prompt on which all members agreed when it was drawn last.",
            "run",
            valid=((lambda value: 0 <= value < 1), "it must be at least 0 and less than 1."),
        ),
    )
    unique_prompts: bool = field(
        default=False,
        metadata=about(
            "Every member answers prompts of its own, and with `antithetic` every pair, instead of the same ones as "
            "all others.",
            "run",
        ),
    )
    num_prompts_per_step: int | None = field(
        default=None,
        metadata=about(
            "Prompts that every member answers in a step. If `None`, it is `per_device_train_batch_size * "
            "gradient_accumulation_steps`.",
            "run",
            valid=((lambda number: number >= 1), "every step needs at least 1 prompt."),
        ),
    )

    num_prompts_per_step_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata=about(
            "Other numbers of prompts, by the number of steps after which they begin: '{50: 16, 100: 32}'.",
            "run",
            valid=by_steps("numbers", least=1, first="num_prompts_per_step"),
        ),
    )

    # Parameters that control several processes
    consistency_check_steps: int = field(
        default=50,
        metadata=about(
            "Steps after which processes compare a checksum of their weights.", "processes", valid=AT_LEAST_1
        ),
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata=about(
            "With DeepSpeed ZeRO-3, gather the weights once a step for generation, so that each process "
            "evaluates members of its own. `False` is for models that do not fit into one device.",
            "processes",
            needs=ZERO3,
        ),
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=about(
            "Keyword arguments for `transformers.AutoModelForCausalLM.from_pretrained`, used when the `model` "
            "argument of the `ESTrainer` is provided as a string.",
            "nobody",
        ),
    )
    trust_remote_code: bool = field(
        default=False,
        metadata=about("Whether to allow models and tokenizers defined by code in their own repository.", "nobody"),
    )

    # Parameters that control the data preprocessing
    shuffle_dataset: bool | None = field(
        default=True, metadata=about("Whether to shuffle the training dataset.", "run")
    )

    # Parameters that control generation
    max_completion_length: int | None = field(
        default=512,
        metadata=about(
            "Maximum length of the generated completion.",
            "run",
            valid=(
                (lambda length: length is not None and length >= 1),
                "give the number of tokens at which a completion is cut, at least 1.",
            ),
        ),
    )
    num_generations: int | None = field(
        default=1,
        metadata=about(
            "Completions per prompt and member. More than one needs `temperature > 0`.",
            "run",
            valid=AT_LEAST_1,
            not_from_grpo="every member answers each prompt once; `population_size` is how many answers there are",
        ),
    )
    num_generations_eval: int | None = field(
        default=None,
        metadata=about(
            "Completions per prompt in evaluations. If `None`, it is `num_generations`.",
            "processes",
            valid=at_least_1_or_none("num_generations"),
            not_from_grpo="evaluations answer each prompt once",
        ),
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata=about(
            "Most sequences generated at once. If `None`, all of a population batch.",
            "processes",
            valid=at_least_1_or_none("no limit"),
            needs=NO_SERVERS,
        ),
    )
    temperature: float = field(
        default=0.0,
        metadata=about(
            "Temperature for sampling; 0.0 is greedy decoding.",
            "run",
            valid=((lambda t: t >= 0), "use 0.0 for greedy decoding or a positive number for sampling."),
        ),
    )
    top_p: float = field(
        default=1.0,
        metadata=about(
            "Cumulative probability of the top tokens to consider when sampling. Must be in (0, 1].",
            "run",
            valid=((lambda p: 0 < p <= 1), "it must be in (0, 1]."),
            needs=SAMPLED,
        ),
    )
    top_k: int = field(
        default=0,
        metadata=about(
            "Number of highest probability tokens to keep when sampling. `0` keeps all.",
            "run",
            valid=((lambda k: k >= 0), "it must not be negative; 0 keeps all tokens."),
            needs=SAMPLED,
        ),
    )
    min_p: float | None = field(
        default=None,
        metadata=about(
            "Minimum token probability when sampling, scaled by the probability of the most likely token. "
            "Must be in [0, 1].",
            "run",
            valid=((lambda p: p is None or 0 <= p <= 1), "it must be in [0, 1]."),
            needs=SAMPLED,
        ),
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=about(
            "Penalty for tokens that occur in the prompt or in what was generated so far.",
            "run",
            valid=((lambda p: p > 0), "it must be positive; 1.0 is no penalty."),
        ),
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=about(
            "Additional keyword arguments of `GenerationConfig`. They override the other parameters.", "run"
        ),
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=about("Additional keyword arguments of `apply_chat_template`.", "run")
    )
    max_tool_calling_iterations: int | None = field(
        default=None,
        metadata=about(
            "Most turns in which tools are called. If `None`, a rollout ends when the model calls none, or at "
            "`max_completion_length`.",
            "run",
            valid=at_least_1_or_none("no limit"),
        ),
    )
    cache_implementation: str | None = field(
        default=None, metadata=about("Implementation of the key-value cache.", "nobody")
    )

    # Parameters of programs that ask the members for completions
    agent_concurrency: int = field(
        default=64,
        metadata=about(
            "Most programs of `agent_func` that run at the same time in a process.",
            "nobody",
            valid=((lambda count: count >= 1), "it must be at least 1."),
        ),
    )
    agent_timeout: float | None = field(
        default=None,
        metadata=about(
            "Seconds after which a program is stopped, and does not count. If `None`, never.",
            "run",
            valid=((lambda seconds: seconds is None or seconds > 0), "it must be positive, or None for no limit."),
        ),
    )
    agent_errors: str = field(
        default="raise",
        metadata=about(
            "What happens if a program raises: 'raise' ends training, 'none' goes on, and the program does not count.",
            "run",
            valid=((lambda choice: choice in ("raise", "none")), "choose one of 'raise', 'none'."),
        ),
    )
    agent_port: int = field(
        default=0,
        metadata=about(
            "Port on 127.0.0.1 at which programs find their models; further processes take the next ones. 0 takes "
            "free ones.",
            "processes",
            valid=((lambda port: 0 <= port < 65536), "it must be in [0, 65535]."),
        ),
    )

    # Parameters that control generation with vLLM
    use_vllm: bool = field(default=False, metadata=about("Whether to generate completions with vLLM.", "processes"))
    vllm_mode: str = field(
        default="colocate",
        metadata=about(
            "Where vLLM runs: 'colocate' (in the trainer's processes) or 'server' (on servers).", "nobody", needs=VLLM
        ),
    )
    vllm_model_impl: str = field(
        default="vllm",
        metadata=about("Implementation of the model: 'vllm' or 'transformers'.", "nobody", needs=COLOCATED),
    )
    vllm_structured_outputs_regex: str | None = field(
        default=None, metadata=about("Regular expression that completions have to match.", "run", needs=VLLM)
    )
    vllm_lora: bool = field(
        default=False,
        metadata=about(
            "Evaluate members as LoRA adapters of one batch; trains the matrices of linear layers only.", "processes"
        ),
    )

    # Parameters that control vLLM on servers
    vllm_server_base_url: list[str] | None = field(
        default=None,
        metadata=about("Base URL of each vLLM server, like 'http://localhost:8000'.", "nobody", needs=SERVERS),
    )
    vllm_server_host: str = field(
        default="0.0.0.0", metadata=about("Host of the vLLM server.", "nobody", needs=ONE_SERVER)
    )
    vllm_server_port: int = field(default=8000, metadata=about("Port of the vLLM server.", "nobody", needs=ONE_SERVER))
    vllm_server_timeout: float = field(
        default=240.0,
        metadata=about(
            "Seconds to wait for vLLM servers to be up, and for each answer of theirs.", "nobody", needs=SERVERS
        ),
    )

    # Parameters that control vLLM in the trainer's processes
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata=about("Share of the device's memory for vLLM, its weights included.", "nobody", needs=COLOCATED),
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata=about(
            "Longest prompt with its completion, in tokens. If `None`, the model's.", "nobody", needs=COLOCATED
        ),
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata=about(
            "Processes that share out each weight matrix and generate together.", "processes", needs=COLOCATED
        ),
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata=about("Whether vLLM frees its key-value cache between generations.", "nobody", needs=COLOCATED),
    )

    # Parameters that control the rewards
    reward_weights: list[float] | None = field(
        default=None,
        metadata=about("Weight of each reward function. Must match the number of reward functions.", "run"),
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata=about(
            "Several rewards to one: 'sum_then_normalize' or 'normalize_then_sum'.",
            "run",
            valid=one_of(get_args(Aggregation)),
        ),
    )
    generation_reward: str = field(
        default="mean",
        metadata=about(
            "Rewards of a prompt's completions to that of the prompt: 'mean', 'max', 'pass@k' (such as 'pass@4') or "
            "'majority'.",
            "run",
            valid=(is_generation_reward, "choose 'mean', 'max', 'majority' or 'pass@k', such as 'pass@4'."),
            needs=SEVERAL_GENERATIONS,
        ),
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata=about("Leave completions that did not end within `max_completion_length` out of the fitness.", "run"),
    )
    reward_workers: int = field(
        default=0,
        metadata=about(
            "Completions that are scored at the same time: processes for reward functions. 0: called in the training "
            "process, with all completions of a member.",
            "nobody",
            valid=NOT_NEGATIVE,
        ),
    )
    reward_timeout: float | None = field(
        default=None,
        metadata=about(
            "Seconds that a reward function may take for a completion, to which it then does not apply. If `None`, "
            "forever.",
            "run",
            valid=((lambda seconds: seconds is None or seconds > 0), "it must be positive, or None for no limit."),
        ),
    )
    reward_retry_on: list[str] | None = field(
        default=None,
        metadata=about(
            "Exceptions after which a reward function is called again, such as 'TimeoutError'.",
            "nobody",
            valid=(
                (lambda names: names is None or isinstance(names, list) and all(isinstance(n, str) for n in names)),
                "give a list of names, such as ['TimeoutError'].",
            ),
        ),
    )
    reward_retries: int = field(
        default=5,
        metadata=about(
            "How often it is called again at most.",
            "nobody",
            valid=AT_LEAST_1,
            needs=((lambda c: bool(c.reward_retry_on)), "reward_retry_on"),
        ),
    )

    # Parameters that control the logging
    eval_kl_prompts: int = field(
        default=0,
        metadata=about(
            "Prompts of each evaluation dataset on which next-token distributions are compared with the start's: "
            "`eval_kl`. 0 compares none.",
            "processes",
            valid=NOT_NEGATIVE,
        ),
    )
    log_format: str = field(
        default="line",
        metadata=about("What is printed of a log: 'line' or 'dict'.", "nobody", valid=one_of(get_args(LogFormat))),
    )
    log_completions: bool = field(
        default=False,
        metadata=about(
            "Whether to print a table of completions and rewards every `logging_steps` steps.", "processes"
        ),
    )
    log_multimodal: bool = field(
        default=True,
        metadata=about("Whether to log the images of prompts together with completions.", "nobody"),
    )
    num_completions_to_print: int | None = field(
        default=None,
        metadata=about(
            "Number of completions to print. If `None`, all of the step's best member are printed.",
            "nobody",
            valid=at_least_1_or_none("all; log_completions=False prints none"),
            needs=LOGGED,
        ),
    )
    log_unique_prompts: bool = field(
        default=False,
        metadata=about(
            "Whether to log one completion of each prompt to the trackers instead of all.", "nobody", needs=LOGGED
        ),
    )
    log_completions_hub_repo: str | None = field(
        default=None,
        metadata=about("Dataset repository on the Hub to which logged completions are uploaded.", "nobody"),
    )

    @classmethod
    def from_grpo_config(cls, config: "GRPOConfig", **overrides: Any) -> "ESConfig":
        """
        The configuration of a run like that of a [`~trl.GRPOConfig`].

        What was changed from GRPO's default and means the same here is carried over, and a step takes as many prompts
        as a generation batch has there, or 8 if batch sizes were left alone. Everything else gets the default value of
        this class: GRPO's learning rate, for one, says nothing about evolution strategies. One warning lists what was
        changed there and has no meaning here.

        Args:
            config ([`~trl.GRPOConfig`]):
                The configuration to start from.
            **overrides:
                Fields of this class.

        Example:

        ```python
        >>> from trl import GRPOConfig

        >>> grpo = GRPOConfig("out", max_completion_length=64, beta=0.04)
        >>> ESConfig.from_grpo_config(grpo, population_size=16)  # warns that beta has no meaning
        ```
        """
        own = _own_fields()
        other_meaning = {name: known.not_from_grpo for name, known in known_of(cls).items() if known.not_from_grpo}
        left_out = without_effect(own) | other_meaning
        values = {item: plain(getattr(config, item.name)) for item in fields(config) if item.init}
        changed = {
            item.name: value
            for item, value in values.items()
            if was_set(value, item) and value not in GRPO_FILLED_IN.get(item.name, ())
        }
        # Of overrides without effect, the new config warns itself
        mine = changed.keys() & left_out.keys() - GRPO_BATCH - overrides.keys()
        dropped = {
            item.name: value for item, value in values.items() if item.name in mine and asks_for_something(value, item)
        }
        if dropped and config.process_index == 0:
            logger.warning(
                "These fields of the GRPOConfig have no meaning for evolution strategies, or none yet, and are left "
                f"out: {listing(dropped, left_out)}."
            )
        carried = {name: value for name, value in changed.items() if name not in left_out.keys() | GRPO_BATCH}
        prompts = config.generation_batch_size // config.num_generations
        if (config.per_device_train_batch_size, config.steps_per_generation) == (8, 1):  # they were left alone
            prompts = max(prompts, DEFAULT_PROMPTS)
        return cls(**{"num_prompts_per_step": Derived(prompts), **carried, **overrides})

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer saves its arguments beside the model, which may be pushed to a public repository
        return {**self.__dict__, "hub_token": None, "model_init_kwargs": self._without_token(None)}

    def to_dict(self) -> dict[str, Any]:
        """See [`~transformers.TrainingArguments.to_dict`]."""
        return super().to_dict() | {"model_init_kwargs": self._without_token("<TOKEN>")}

    def __str__(self) -> str:
        """See [`~transformers.TrainingArguments`]."""
        token = self.model_init_kwargs.get("token") if isinstance(self.model_init_kwargs, dict) else None
        return super().__str__().replace(token, "<TOKEN>") if isinstance(token, str) else super().__str__()

    __repr__ = __str__

    def _without_token(self, instead: str | None) -> Any:
        """`model_init_kwargs` as they may be shown."""
        options = self.model_init_kwargs
        return options | {"token": instead} if isinstance(options, dict) and options.get("token") else options

    def to_sanitized_dict(self) -> dict[str, Any]:
        """See [`~transformers.TrainingArguments.to_sanitized_dict`]."""
        plain_numbers = {key: int(v) for key, v in self.to_dict().items() if isinstance(v, Derived)}
        return super().to_sanitized_dict() | plain_numbers

    @property
    def samples(self) -> bool:
        """Whether completions are sampled, and not the most likely ones."""
        return self._generates_with("temperature") > 0

    def sigma_at(self, step: int, steps: int) -> float:
        """
        Sigma after `step` of `steps` steps: a straight line, or half a cosine (arXiv 1608.03983, equation 5, without
        restarts), from `sigma` to `sigma_min_ratio * sigma`.
        """
        if self.sigma_schedule == "constant":
            return self.sigma
        done = min(step / steps, 1.0)
        left = 1.0 - done if self.sigma_schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
        return self.sigma * (self.sigma_min_ratio + (1.0 - self.sigma_min_ratio) * left)

    def population_size_after(self, steps: int) -> int:
        """Members of the step that follows so many steps."""
        return value_after(steps, self.population_size, self.population_size_schedule)

    def num_prompts_after(self, steps: int) -> int:
        """Prompts of the step that follows so many steps."""
        return value_after(steps, self.num_prompts_per_step, self.num_prompts_per_step_schedule)

    @property
    def largest_num_prompts(self) -> int:
        """The most prompts that a step can have."""
        return largest_of(self.num_prompts_per_step, self.num_prompts_per_step_schedule)

    @property
    def members_per_prompt(self) -> int | None:
        """How many members answer the same prompts of a step. `None`: all of them."""
        if not self.unique_prompts:
            return None
        return 2 if self.antithetic else 1

    def num_rows_after(self, steps: int) -> int:
        """Rows of the dataset for the step that follows so many steps."""
        prompts = self.num_prompts_after(steps)
        if self.members_per_prompt is None:
            return prompts
        return self.population_size_after(steps) // self.members_per_prompt * prompts

    @property
    def largest_num_rows(self) -> int:
        """The most rows of the dataset that a step can have."""
        changes = [0, *(self.population_size_schedule or {}), *(self.num_prompts_per_step_schedule or {})]
        return max(map(self.num_rows_after, changes))

    @property
    def largest_population(self) -> int:
        """The most members that a step can have."""
        return largest_of(self.population_size, self.population_size_schedule)

    @property
    def on_servers(self) -> bool:
        """Whether servers generate."""
        return self.use_vllm and self.vllm_mode == "server"

    @property
    def has_beams(self) -> bool:
        """Whether completions are those of a beam search."""
        return (self.generation_kwargs or {}).get("num_beams", 1) > 1

    def _generates_with(self, name: str) -> Any:
        """A generation parameter, which `generation_kwargs` may override."""
        return (self.generation_kwargs or {}).get(name, getattr(self, name))

    def __post_init__(self):
        # By `dataclasses.replace`, or from `to_dict`
        self._is_copy = Derived in (type(self.per_device_train_batch_size), type(self.gradient_accumulation_steps))
        self._said: dict[str, Any] = {}  # settings without effect, for one warning
        self._reasons = without_effect(_own_fields())
        self._leave_out_what_has_no_effect()
        self.top_k = self.top_k or 0  # `None` keeps all, too
        self._express_learning_rate()
        for name, hint in _type_hints().items():
            if name not in SCHEDULES:
                setattr(self, name, converted(name, getattr(self, name), hint))
        for item in fields(self):
            if item.name in REFUSED and asks_for_something(getattr(self, item.name), item):
                raise ValueError(f"`{item.name}={getattr(self, item.name)!r}` is not valid: {REFUSED[item.name]}")
        if not torch.accelerator.is_available() and not is_torch_xla_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and (self.on_servers or device_has_bf16(self.use_cpu))
        if self.save_steps is None and self.save_strategy == "steps":
            self.save_steps = self._default_save_steps()
        prompts = self._prompts_of_a_step()
        self.per_device_train_batch_size = self.per_device_train_batch_size or DEFAULT_PROMPTS

        use_deepspeed = self.deepspeed is not None or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
            # Without it, Accelerate starts DeepSpeed's processes as runs of one process each
            self.ddp_backend = self.ddp_backend or ("gloo" if launched_processes() > 1 else None)
            if use_deepspeed:
                deepspeed_config.do_without_compiler()
        super().__post_init__()
        # Reward functions may change the working directory
        self.output_dir = os.path.abspath(self.output_dir)
        self._validate_launch()
        if self.deepspeed_plugin is not None:
            deepspeed_config.check(self.deepspeed_plugin, self.bf16)
            deepspeed_config.prepare(self.deepspeed_plugin)

        self.num_prompts_per_step = prompts
        self._normalize()
        # One batch of the dataloader is the batch of a step
        self.per_device_train_batch_size = Derived(self.largest_num_rows)
        self.gradient_accumulation_steps = Derived(1)
        self._validate()
        if self.data_seed is None or isinstance(self.data_seed, Derived):
            self.data_seed = Derived(self.seed)  # the order of the prompts must not hang on the global random state
        self._warn_of_settings_without_effect()

    def _express_learning_rate(self) -> None:
        """Make a multiple of sigma a number, also where sigma was changed since."""
        if isinstance(self.learning_rate, InSigmas):
            self.learning_rate = InSigmas(self.learning_rate.ratio, float(self.sigma))
        elif isinstance(self.learning_rate, str):
            self.learning_rate = in_sigmas(self.learning_rate, float(self.sigma)) or self.learning_rate

    def check(self) -> None:
        """Check what was set since the config was made like what it was made with."""
        self.__post_init__()

    def _leave_out_what_has_no_effect(self) -> None:
        """Reset fields that have no effect, so that they have none, and keep them for the warning."""
        for item in fields(self):
            if item.name in self._reasons:
                value = plain(getattr(self, item.name))
                if asks_for_something(value, item):
                    self._said[item.name] = value
                setattr(self, item.name, default(item))

    def _default_save_steps(self) -> float:
        between = self.eval_steps or self.logging_steps
        if not self.load_best_model_at_end or self.eval_strategy != "steps" or not between:
            return DEFAULT_SAVE_STEPS
        return between if between < 1 else -(-DEFAULT_SAVE_STEPS // between) * between

    def _prompts_of_a_step(self) -> int:
        batch = {name: getattr(self, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
        of_a_batch, batches = batch.values()
        product = (DEFAULT_PROMPTS if of_a_batch is None else of_a_batch) * batches
        # What was derived when this config's original was made gives way
        set_here = {
            name: value for name, value in batch.items() if value is not None and not isinstance(value, Derived)
        }
        if self.gradient_accumulation_steps == 1:
            set_here.pop("gradient_accumulation_steps", None)
        if self.num_prompts_per_step is None or (isinstance(self.num_prompts_per_step, Derived) and set_here):
            return Derived(product)
        if product != self.num_prompts_per_step:
            self._said |= set_here
            self._reasons |= dict.fromkeys(set_here, f"a step takes num_prompts_per_step={self.num_prompts_per_step}")
        return self.num_prompts_per_step

    def _normalize(self) -> None:
        """Write what can be written in several ways in one."""
        if isinstance(self.vllm_server_base_url, str):
            self.vllm_server_base_url = [self.vllm_server_base_url]
        if isinstance(self.model_init_kwargs, dict) and "torch_dtype" in self.model_init_kwargs:
            options = dict(self.model_init_kwargs)
            older = options.pop("torch_dtype")
            if options.setdefault("dtype", older) != older:
                raise ValueError(
                    f"`model_init_kwargs` has 'torch_dtype' ({older!r}) and 'dtype' ({options['dtype']!r}), its newer "
                    "name. Leave 'torch_dtype' out."
                )
            self.model_init_kwargs = options
        for name in SCHEDULES:
            setattr(self, name, as_schedule(name, getattr(self, name)))
        if self.chat_template_kwargs:
            self.chat_template_kwargs = with_schemas(self.chat_template_kwargs)
        if self.generation_kwargs:
            self._drop_what_generation_kwargs_repeat()
        if self.has_beams and self.perturbation == "gaussian" and self.population_batch_size is None:
            self.population_batch_size = 1
        for name in ("num_generations", "num_generations_eval"):
            if (getattr(self, name) or 0) > 1 and not self.samples:
                self._said[name] = getattr(self, name)
                self._reasons[name] = "greedy completions would be equal, so 1 is taken; set temperature > 0 for more"
                setattr(self, name, 1)

    def _drop_what_generation_kwargs_repeat(self) -> None:
        """Drop options from `generation_kwargs` that agree with other fields: the engines set them by themselves."""
        same = {
            "do_sample": self.samples,
            "num_return_sequences": self.num_generations,
            "max_length": None,
            "typical_p": 1.0,
            "epsilon_cutoff": 0.0,
            "eta_cutoff": 0.0,
            "top_h": None,
            "n": self.num_generations,
            "max_tokens": self.max_completion_length,
        }
        if self.generation_kwargs.get("do_sample") is True and not self.samples:
            # Which is what a GRPOConfig has that leaves its temperature of 1.0 alone
            self._said["generation_kwargs['do_sample']"] = True
            self._reasons["generation_kwargs['do_sample']"] = "temperature=0.0 is greedy; set temperature > 0"
            same["do_sample"] = True
        self.generation_kwargs = {
            key: value for key, value in self.generation_kwargs.items() if key not in same or value != same[key]
        } or None

    def _warn_of_settings_without_effect(self) -> None:
        used = AcceleratorConfig(use_seedable_sampler=self.accelerator_config.use_seedable_sampler)
        for name, value in self.accelerator_config.to_dict().items():
            if value != used.to_dict()[name]:
                self._said[f"accelerator_config.{name}"] = value
        self.accelerator_config = used
        by_name = {item.name: item for item in fields(self)}
        for name, known in known_of(ESConfig).items():
            value = getattr(self, name)
            if known.needs is None or not was_set(value, by_name[name]):
                continue
            works, needed = known.needs
            if not works(self):
                # They keep their values, so a copy says only what its original has not
                if not self._is_copy or (name, value) not in ALREADY_SAID:
                    self._said[name] = value
                    self._reasons[name] = f"needs {needed}"
                    ALREADY_SAID.append((name, value))
        sentences = []
        if self._said:
            sentences.append(
                "These settings have no meaning for evolution strategies, or none yet or beside the others, and are "
                f"left out: {listing(self._said, self._reasons)}."
            )
        if not self._is_copy and 0 < self.learning_rate < LEAST_LEARNING_RATE:
            sentences.append(
                f"learning_rate={self.learning_rate!r} is one of GRPO's: with evolution strategies it moves the "
                "weights by next to nothing. The paper's is 5e-4, the default."
            )
        del self._said, self._reasons, self._is_copy
        if sentences and self.process_index == 0:
            logger.warning(" ".join(sentences))

    def _validate_launch(self) -> None:
        if self.world_size != launched_processes():
            raise ValueError(
                f"The launcher started {launched_processes()} processes, but Accelerate takes each of them for a run "
                f"of {self.world_size}. On CPU, launch with recipes/accelerate_configs/cpu_two_processes.yaml or with "
                "torchrun, and set `use_cpu=True`."
            )
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise ValueError(REFUSED["fsdp"])

    def _validate(self) -> None:
        for name, known in known_of(ESConfig).items():
            value = self._generates_with(name)
            if known.valid is not None and not known.valid[0](value):
                raise ValueError(f"`{name}={value!r}` is not valid: {known.valid[1]}")
        for name in ("generation_kwargs", "chat_template_kwargs", "reward_weights"):
            try:
                json.dumps(getattr(self, name))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` cannot be written into the history: {error}. Give numbers, "
                    "text, lists and dictionaries."
                ) from error
        GenerationConfig(cache_implementation=self.cache_implementation)  # refuses what it does not know
        pairs = "antithetic sampling evaluates members in pairs; use even numbers or antithetic=False."
        sizes = (self.population_size_schedule or {}).values()
        require(self, not self.antithetic or self.population_size % 2 == 0, "population_size", pairs)
        require(self, not self.antithetic or all(size % 2 == 0 for size in sizes), "population_size_schedule", pairs)
        require(
            self,
            self.skip_settled_prompts == 0 or self.num_prompts_per_step_schedule is None,
            "num_prompts_per_step_schedule",
            "which prompts are settled is known of those of equally large steps only; set skip_settled_prompts to 0.",
        )
        problem = shaping_problem(self.fitness_shaping, self.members_per_prompt)
        require(self, problem is None, "fitness_shaping", problem or "")
        require(
            self,
            self.skip_settled_prompts == 0 or not self.unique_prompts,
            "skip_settled_prompts",
            "with unique_prompts=True, two members at most have the same prompt, which is too few to call it settled. "
            "Set one of the two to its default.",
        )
        for name in ("num_generations", "num_generations_eval"):
            number = getattr(self, name)
            require(
                self,
                number is None or number >= completions_needed(self.generation_reward),
                "generation_reward",
                f"it needs as many completions of a prompt, but {name}={number} (more than 1 need temperature > 0).",
            )
        for name, plain_value in (
            ("dataloader_num_workers", 0),
            ("train_sampling_strategy", "random"),
            ("ignore_data_skip", False),
        ):
            value = getattr(self, name, plain_value)  # which older versions of Transformers may not have
            require(
                self,
                self.skip_settled_prompts == 0 or value == plain_value,
                "skip_settled_prompts",
                f"what is drawn follows from the steps before, but {name}={value!r}; set {name}={plain_value!r}.",
            )
        require(
            self,
            self.save_strategy != "best" or self.metric_for_best_model is not None,
            "save_strategy",
            "nothing says which checkpoint is the best; set metric_for_best_model, such as 'reward'.",
        )
        require(
            self,
            self.auto_step == 0 or self.master_weights != "none",
            "auto_step",
            "steps are tried without a trace with master weights only; set master_weights to 'device' or 'host'.",
        )
        require(
            self,
            self.auto_step == 0 or not self.on_servers,
            "auto_step",
            "servers do not try steps; set it to 0, or vllm_mode='colocate'.",
        )
        require(
            self,
            self.reward_timeout is None or self.reward_workers > 0,
            "reward_timeout",
            "a function that is called in the training process cannot be ended; set reward_workers too, such as 4.",
        )
        require(
            self,
            self.log_completions_hub_repo is None or self.log_completions,
            "log_completions_hub_repo",
            "completions are not logged; set log_completions=True.",
        )


def launched_processes() -> int:
    """How many processes the launcher says that it started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_has_bf16(use_cpu: bool) -> bool:
    """Whether the device, which is the CPU or an accelerator, computes with bfloat16 by itself. If not, it is said."""
    if use_cpu:
        # Without AVX-512, torch multiplies bfloat16 matrices several times slower than float32 ones
        found = torch.backends.cpu.get_cpu_capability() == "AVX512"
    elif torch.cuda.is_available():
        found = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = is_torch_bf16_gpu_available() or is_torch_xla_available()
    if not found:
        logger.warning_once(
            f"This {'CPU' if use_cpu else 'device'} has no fast bfloat16, so weights have the dtype that the model is "
            "given in (float32 if it is loaded by its name). `bf16=True` makes them bfloat16. (Shown once.)"
        )
    return found


@cache
def _own_fields() -> frozenset[str]:
    """Fields that the config defines itself."""
    return frozenset(vars(ESConfig)["__annotations__"])


@cache
def _type_hints() -> dict[str, Any]:
    hints = get_type_hints(ESConfig)
    return {item.name: hints[item.name] for item in fields(ESConfig) if item.init}
