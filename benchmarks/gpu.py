"""
Noise, updates and population batches on a GPU: `python benchmarks/gpu.py`.

Models have the shapes of Qwen2.5 and random weights. Every figure is the median of several rounds after one that does
not count, timed by the host around a synchronisation.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from es_trainer import ESConfig
from es_trainer.engines import PopulationBatch, TransformersEngine
from es_trainer.evolution import EvolutionStrategy, Member
from es_trainer.noise import noise
from es_trainer.noise import shapes as perturbation


QWEN = {"vocab_size": 151936, "max_position_embeddings": 4096, "tie_word_embeddings": True, "eos_token_id": 2}
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
SIGMA, LEARNING_RATE = 1e-3, 5e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(function: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def make_model(size: str, dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(dtype)
        model = Qwen2ForCausalLM(Qwen2Config(**{**QWEN, **SHAPES[size]})).eval()
        torch.set_default_dtype(torch.float32)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def show_kernels(weights: int, rounds: int) -> None:
    """The noise kernel against the device's copies and torch's own normals."""
    out, other = (torch.zeros(weights, device=DEVICE) for _ in range(2))
    copy = median_seconds(lambda: out.copy_(other), rounds)
    print(f"copy: {8 * weights / copy / 1e9:.0f} GB/s")
    randn = median_seconds(lambda: torch.randn(weights, out=out), rounds)
    print(f"torch.randn: {weights / randn / 1e9:.1f} G/s")
    fill = median_seconds(lambda: noise.fill(out, "weight", 1), rounds)
    print(f"noise.fill: {weights / fill / 1e9:.1f} G/s, {randn / fill:.2f} of torch.randn's")
    half = out.bfloat16()
    for target, rounding in ((out, None), (half, None), (half, 1)):
        took = median_seconds(lambda t=target, r=rounding: noise.add(other, t, "w", [1], [1e-3], rounding=r), rounds)
        moved = 4 * weights + target.nbytes
        kind = "" if rounding is None else ", stochastic rounding"
        print(f"noise.add to {target.dtype}{kind}: {weights / took / 1e9:.1f} G/s, {moved / took / 1e9:.0f} GB/s")
    seeds = list(range(1, 31))
    took = median_seconds(lambda: noise.add(out, out, "w", seeds, [1e-3] * 30), rounds)
    print(f"noise.add of 30 members: {30 * weights / took / 1e9:.1f} G/s")


def update(strategy: EvolutionStrategy) -> None:
    strategy.tell(strategy.ask(), torch.linspace(-1, 1, strategy.population_size).tolist())
    strategy.step()


def show_strategy(size: str, master_weights: str, rounds: int) -> None:
    """A member's perturbation and an update, for a model in bfloat16."""
    model = make_model(size, torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    for name, kind in (("gaussian", perturbation.Gaussian()), ("low_rank", perturbation.LowRank())):
        strategy = EvolutionStrategy(
            list(model.named_parameters()), lr=LEARNING_RATE, master_weights=master_weights, perturbation=kind
        )
        took = median_seconds(lambda s=strategy: s.perturb(Member(1)), rounds)
        strategy.restore()
        print(f"{size} {name}, masters {master_weights}: perturb {took * 1e3:.1f} ms, {count / took / 1e9:.1f} G/s")
        took = median_seconds(lambda s=strategy: update(s), rounds)
        print(f"{size} {name}, masters {master_weights}: update of 30 members {took * 1e3:.0f} ms")
        del strategy  # before the next one's masters are made
    if DEVICE.type == "cuda":
        print(f"{size}, masters {master_weights}: peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB")


def show_population(size: str, prompts: int, tokens: int, population: int, rounds: int) -> None:
    """Tokens/s of a population in one batch, of a plain batch of as many rows, and of members one at a time."""
    model = make_model(size, torch.bfloat16)
    strategy = EvolutionStrategy(
        list(model.named_parameters()),
        lr=LEARNING_RATE,
        sigma=SIGMA,
        population_size=population,
        perturbation=perturbation.LowRank(),
    )
    batch = PopulationBatch(model, strategy.weights)
    args = ESConfig("bench", use_cpu=True, max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens})
    engine = TransformersEngine(model, make_tokenizer(), args)
    draw = torch.Generator().manual_seed(0)
    prompt_ids = [torch.randint(3, 250, (64,), generator=draw).tolist() for _ in range(prompts)]

    def members() -> None:
        with batch.install(strategy.ask().members, SIGMA) as rows:
            engine.generate(prompt_ids, seed=0, members=rows)

    def plain() -> None:
        engine.generate(prompt_ids * population, seed=0)

    def alone() -> None:
        strategy.perturb(strategy.ask().members[0])
        engine.generate(prompt_ids, seed=0)
        strategy.restore()

    made = population * prompts * tokens
    took, without, one = (median_seconds(function, rounds) for function in (members, plain, alone))
    print(
        f"{size}, {population} members x {prompts} prompts x {tokens} tokens: {made / took:.0f} tokens/s; plain batch "
        f"{made / without:.0f}, {without / took:.0%} of it; one at a time {made / population / one:.0f}, "
        f"{one * population / took:.1f} times slower; {took / tokens * 1e3:.0f} ms a token"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.5B", "7B"])
    parser.add_argument("--weights", type=int, default=1 << 28, help="of the kernels' figures")
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU")
    show_kernels(options.weights, options.rounds)
    for size in options.sizes:
        for master_weights in ("device", "host"):
            show_strategy(size, master_weights, options.rounds)
        show_population(size, options.prompts, options.tokens, options.population, options.rounds)
