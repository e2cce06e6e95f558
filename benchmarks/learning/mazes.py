"""Mazes of several rooms, one after the other, with a reward at the end only: the environment of "Agents"."""

import statistics
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer

from benchmarks.delayed_reward import SYSTEM, Maze, direction

from .judge import Judge


OVER = "The game is over."
HELD_OUT, HELD_OUT_SEED = 32, 1 << 20


@dataclass(frozen=True)
class Mazes:
    """
    A game is won if all rooms are passed in a quarter more turns. Each turn, the model is told what it sees in the
    conversation so far, and the first direction that it names is where it goes.

    Args:
        rooms (`int`):
            The horizon: rooms of a maze.
    """

    rooms: int
    tokens = 6  # of a turn
    metric = "won"

    def inputs(self, trainer: str, seed: int, reward: str | None) -> dict[str, Any]:
        """Arguments of the trainer."""
        games = range(seed << 10, (seed << 10) + 1024)
        if trainer == "es":
            return {"agent_func": self.play, "train_dataset": Dataset.from_dict({"seed": list(games)})}
        prompts = [{"prompt": [{"role": "user", "content": str(game)}]} for game in games]
        return {
            "rollout_func": self.rollouts,
            "reward_funcs": lambda won, **kwargs: won,
            "train_dataset": Dataset.from_list(prompts),
        }

    def measure(
        self, judge: Judge, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: bool
    ) -> dict[str, float]:
        """Share of held-out games that are won by greedy answers, and the mean number of rooms that are passed."""
        games = self.played(model, tokenizer, range(HELD_OUT_SEED, HELD_OUT_SEED + HELD_OUT), sample=False)
        return {
            "won": statistics.fmean(game.maze.get_reward() for game in games),
            "rooms": statistics.fmean(game.maze.passed for game in games),
        }

    def maze(self) -> Maze:
        maze = Maze()
        maze.rooms, maze.turns = self.rooms, self.rooms + self.rooms // 4
        return maze

    async def play(self, example: dict[str, Any], endpoint: Any) -> float:
        """One game by OpenAI's API: the reward."""
        maze = self.maze()
        view = maze.reset(**example)
        messages = [{"role": "system", "content": SYSTEM}]
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        async with httpx.AsyncClient(
            base_url=endpoint.base_url, headers=headers, timeout=None, verify=False
        ) as client:
            while view != OVER:
                messages.append({"role": "user", "content": view})
                reply = await client.post("/chat/completions", json={"model": endpoint.model, "messages": messages})
                text = reply.raise_for_status().json()["choices"][0]["message"]["content"]
                messages.append({"role": "assistant", "content": text})
                view = maze.go(direction(text))
        return maze.get_reward()

    def rollouts(self, prompts: list[list[dict[str, str]]], trainer: GRPOTrainer) -> dict[str, list]:
        """The same games by TRL's protocol: a prompt names the game, and there is a rollout for each prompt."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        with trainer.accelerator.autocast():
            games = self.played(
                model, trainer.processing_class, [int(prompt[-1]["content"]) for prompt in prompts], sample=True
            )
        return {
            "prompt_ids": [game.prompt for game in games],
            "completion_ids": [game.completion for game in games],
            "env_mask": [game.mask for game in games],
            "logprobs": None,  # of vLLM, to correct for its rounding
            "won": [game.maze.get_reward() for game in games],
        }

    @torch.no_grad()
    def played(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seeds: Any, sample: bool
    ) -> list["Game"]:
        """Games side by side, in one batch each turn."""
        games = [Game(self.maze(), seed, tokenizer) for seed in seeds]
        while playing := [game for game in games if game.view != OVER]:
            written = tokenizer.pad(
                {"input_ids": [game.prompt + game.completion for game in playing]},
                padding_side="left",
                return_tensors="pt",
            )
            made = model.generate(**written, do_sample=sample, top_k=0, top_p=1.0, max_new_tokens=self.tokens)
            for game, ids in zip(playing, made[:, written["input_ids"].shape[1] :].tolist(), strict=True):
                game.answer(ids, tokenizer)
        return games


class Game:
    """
    The tokens of a game.

    Args:
        maze ([`Maze`]):
            The maze.
        seed (`int`):
            Seed of the maze.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer, of a model that has conversations in ChatML.
    """

    def __init__(self, maze: Maze, seed: int, tokenizer: PreTrainedTokenizerBase):
        self.maze = maze
        self.view = maze.reset(seed=seed)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.view}]
        self.prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        self.completion: list[int] = []
        self.mask: list[int] = []  # 1 for tokens of the model

    def answer(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokens of an answer, and append what is seen then."""
        end = tokenizer.eos_token_id
        if end in ids:
            ids = ids[: ids.index(end) + 1]
        self.completion += ids
        self.mask += [1] * len(ids)
        self.view = self.maze.go(direction(tokenizer.decode(ids, skip_special_tokens=True)))
        if self.view != OVER:
            following = f"\n<|im_start|>user\n{self.view}<|im_end|>\n<|im_start|>assistant\n"
            seen = ([] if ids[-1] == end else [end]) + tokenizer(following)["input_ids"]
            self.completion += seen
            self.mask += [0] * len(seen)
