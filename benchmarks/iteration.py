"""
One whole iteration against the loop of arXiv 2509.24372's code, on the same engine: `python benchmarks/iteration.py`.

The paper's loop adds noise to the weights in place, generates, subtracts the noise, and after the population adds
every member's noise once more, weighted; all of it by seeded torch noise, a parameter at a time. Here it runs on this
package's engine with the same population, prompts and tokens. Against it stand Gaussian noise, where only the
strategy's own work differs, and low-rank noise with the whole population in one batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from es_trainer import ESConfig
from es_trainer.engines import PopulationBatch, Rows, TransformersEngine
from es_trainer.evolution import EvolutionStrategy
from es_trainer.noise import shapes as perturbation
from es_trainer.rewards import conciseness_reward
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

    def evaluate(self, members: Rows | None = None) -> list[float]:
        """Mean rewards of the members that are installed, or of the weights as they are."""
        completions = self.engine.generate(self.prompt_ids, seed=0, members=members)
        answers = self.answers * (len(completions) // len(self.answers))
        rewards = conciseness_reward([completion.text for completion in completions], answer=answers)
        return torch.tensor(rewards).view(-1, len(self.answers)).mean(1).tolist()


class Gaussian(Iteration):
    perturbation = perturbation.Gaussian()

    def __init__(self, *args):
        super().__init__(*args)
        self.optimizer = EvolutionStrategy(
            list(self.model.named_parameters()),
            lr=LEARNING_RATE,
            sigma=SIGMA,
            population_size=self.population,
            perturbation=self.perturbation,
        )

    def run(self) -> None:
        population = self.optimizer.ask()
        rewards = []
        for member in population:
            self.optimizer.perturb(member)
            rewards += self.evaluate()
        self.optimizer.restore()
        self.optimizer.tell(population, rewards)
        self.optimizer.step()


class LowRank(Gaussian):
    perturbation = perturbation.LowRank()

    def __init__(self, *args):
        super().__init__(*args)
        self.batch = PopulationBatch(self.model, self.optimizer.weights)

    def run(self) -> None:
        population = self.optimizer.ask()
        with self.batch.install(population.members, SIGMA) as members:
            rewards = self.evaluate(members)
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
            rewards += self.evaluate()
            self.add_noise(seed, -SIGMA)
        spread = torch.tensor(rewards)
        scores = (spread - spread.mean()) / (spread.std() + 1e-8)
        for seed, score in enumerate(scores.tolist()):
            self.add_noise(seed, LEARNING_RATE / self.population * score)


OURS = {"gaussian": Gaussian, "low_rank": LowRank}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--noise", nargs="+", choices=OURS, default=list(OURS))
    options = parser.parse_args()
    print(f"N={options.population}, {options.tokens} tokens, SmolLM2-135M")
    for dtype in (torch.float32, torch.bfloat16):
        for prompts in options.prompts:
            sizes = (dtype, options.population, prompts, options.tokens)
            sides = [*(OURS[name](*sizes) for name in options.noise), Papers(*sizes)]
            for side in sides[:-1]:
                side.run()
            sides[-1].evaluate()
            times = [[seconds(side.run) for side in sides] for _ in range(options.rounds)]
            *ours, papers = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{dtype}, {prompts} prompts: the paper's loop {papers:.1f} s an iteration", flush=True)
            for i, (name, mine) in enumerate(zip(options.noise, ours, strict=True)):
                ratio = statistics.median(round_[-1] / round_[i] for round_ in times)
                print(f"    {name}: {mine:.1f} s, {ratio:.2f} times faster", flush=True)
