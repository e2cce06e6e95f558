"""
A reward that comes at the end of up to ten turns: `python benchmarks/delayed_reward.py`, a quarter of an hour on two
cores.

SmolLM2 plays the maze of examples/agents/environment.py by OpenAI's API. Each turn, it is told what it sees, and the
first direction in its answer is where it goes. A game counts 1 if it ends outside, else 0: nothing says which turns
were good. Held-out games are played with the unperturbed weights. The picture is written into the output folder.
"""

import argparse
import re
import sys
from pathlib import Path

import httpx
from datasets import Dataset

from es_trainer import ESConfig, ESTrainer
from es_trainer.report.plots import plot_rewards, read_run
from es_trainer.smollm2 import smollm2


sys.path.append(str(Path(__file__).parents[1] / "examples" / "agents"))
from environment import DIRECTIONS, Maze  # noqa: E402


HELD_OUT = 1 << 20  # seeds from here on
SYSTEM = "You are in a maze. Answer with one word."


async def play(example, endpoint) -> dict:
    """One game. Returns whether it was won, and how many rooms were passed."""
    maze = Maze()
    view = maze.reset(**example)
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    async with httpx.AsyncClient(base_url=endpoint.base_url, headers=headers, timeout=None, verify=False) as client:
        while view != "The game is over.":
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": view}]
            reply = await client.post("/chat/completions", json={"model": endpoint.model, "messages": messages})
            text = reply.raise_for_status().json()["choices"][0]["message"]["content"]
            view = maze.go(direction(text))
    return {"reward": {"won": maze.get_reward()}, "rooms": maze.passed}


def direction(text: str) -> str:
    """The first direction that an answer names."""
    named = re.search("|".join(DIRECTIONS), text.lower())
    return named[0] if named else "nowhere"


def games(count: int, first: int = 0) -> Dataset:
    return Dataset.from_dict({"seed": list(range(first, first + count))})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--games", type=int, default=4, help="of each member in a step")
    parser.add_argument("--held_out", type=int, default=32)
    parser.add_argument("--sigma", type=float, default=0.01)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--output_dir", default="delayed-reward")
    options = parser.parse_args()
    args = ESConfig(
        output_dir=options.output_dir,
        use_cpu=True,
        bf16=False,
        max_steps=options.steps,
        population_size=options.population,
        num_prompts_per_step=options.games,
        perturbation="low_rank",
        sigma=options.sigma,
        learning_rate=options.learning_rate,
        fitness_shaping="prompt_centered",
        max_completion_length=6,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        per_device_eval_batch_size=options.held_out,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = ESTrainer(
        model=smollm2(),
        args=args,
        train_dataset=games(1024),
        eval_dataset=games(options.held_out, HELD_OUT),
        agent_func=play,
    )
    trainer.train()
    held_out = [log for log in trainer.state.log_history if "eval_reward" in log]
    trainer.state.save_to_json(str(Path(options.output_dir) / "trainer_state.json"))
    plot_rewards({"maze": read_run(options.output_dir)}, Path(options.output_dir) / "delayed_reward.png")
    for log in held_out:
        print(f"step {log['step']}: {log['eval_reward']:.1%} of {options.held_out} held-out games won", flush=True)
