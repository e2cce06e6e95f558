"""
One whole iteration against the loop of arXiv 2509.24372's code, on the same engine: `python benchmarks/iteration.py`.

The paper's loop adds noise to the weights in place, generates, subtracts the noise, and after the population adds
every member's noise once more, weighted; all of it by seeded torch noise, a parameter at a time. Here it runs on this
package's engine with the same population, prompts and tokens, so that only the strategy's own work differs.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from es_trainer import ESConfig
from es_trainer.evolution import EvolutionStrategy
from es_trainer.rewards import conciseness_reward
from es_trainer.rollout import TransformersEngine
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness


SIGMA, LEARNING_RATE = 1e-3, 5e-4


class Iteration:
    """One iteration of either kind on one model."""

    def __init__(self, dtype: torch.dtype, population: int, prompts: int, tokens: int):
        folder = smollm2()
        self.population = population
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        # The same number of tokens every time, whatever the weights say
        args = ESConfig(
            "bench", use_cpu=True, max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens}
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.engine = TransformersEngine(self.model, tokenizer, args)
        rows = conciseness(train_size=prompts).train_dataset
        self.answers = list(rows["answer"])
        self.prompt_ids = self.engine.tokenize(list(rows["prompt"]))

    def evaluate(self) -> float:
        completions = self.engine.generate(self.prompt_ids, seed=0)
        rewards = conciseness_reward([completion.text for completion in completions], answer=self.answers)
        return sum(rewards) / len(rewards)


class Ours(Iteration):
    def __init__(self, *args):
        super().__init__(*args)
        self.optimizer = EvolutionStrategy(
            list(self.model.named_parameters()), lr=LEARNING_RATE, sigma=SIGMA, population_size=self.population
        )

    def run(self) -> None:
        population = self.optimizer.ask()
        rewards = []
        for member in population:
            self.optimizer.perturb(member)
            rewards.append(self.evaluate())
        self.optimizer.restore()
        self.optimizer.tell(population, rewards)
        self.optimizer.step()


class Papers(Iteration):
    @torch.no_grad()
    def add_noise(self, seed: int, scale: float) -> None:
        for parameter in self.model.parameters():
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(noise, alpha=scale)

    def run(self) -> None:
        rewards = []
        for seed in range(self.population):
            self.add_noise(seed, SIGMA)
            rewards.append(self.evaluate())
            self.add_noise(seed, -SIGMA)
        spread = torch.tensor(rewards)
        scores = (spread - spread.mean()) / (spread.std() + 1e-8)
        for seed, score in enumerate(scores.tolist()):
            self.add_noise(seed, LEARNING_RATE / self.population * score)


def seconds(iteration: Iteration) -> float:
    start = time.perf_counter()
    iteration.run()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = (options.population, options.prompts, options.tokens)
    print("N={}, {} prompts, {} tokens, SmolLM2-135M".format(*sizes))
    for dtype in (torch.float32, torch.bfloat16):
        ours, papers = Ours(dtype, *sizes), Papers(dtype, *sizes)
        ours.evaluate(), papers.evaluate()
        pairs = [(seconds(ours), seconds(papers)) for _ in range(options.rounds)]
        mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(
            f"{dtype}: {mine:.1f} s an iteration; the paper's loop {theirs:.1f} s; {ratio:.2f} times faster",
            flush=True,
        )
