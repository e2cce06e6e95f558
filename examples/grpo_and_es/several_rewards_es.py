"""Several weighted rewards on conversations: whether the answer is right, its format, and its length."""

import re

from datasets import load_dataset
from es_trainer import ESConfig, ESTrainer
from trl.rewards import get_soft_overlong_punishment, think_format_reward


SYSTEM_PROMPT = "Think between <think> and </think>, then give the number that is the answer, and nothing else."


def make_conversation(example):
    prompt = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": example["question"]}]
    return {"prompt": prompt, "solution": example["answer"].split("####")[-1].strip()}


def right_number(completions, solution, log_extra, **kwargs):
    numbers = [re.findall(r"-?\d+", completion[0]["content"].split("</think>")[-1]) for completion in completions]
    log_extra("solution", solution)
    return [float(found[-1:] == [number]) for found, number in zip(numbers, solution, strict=True)]


dataset = load_dataset("openai/gsm8k", "main", split="train").map(make_conversation, remove_columns=["question"])

training_args = ESConfig(
    output_dir="Qwen2.5-1.5B-gsm8k",
    max_completion_length=256,
    reward_weights=[1.0, 0.2, 0.1],
    log_completions=True,
    logging_steps=1,
)
trainer = ESTrainer(
    model="Qwen/Qwen2.5-1.5B-Instruct",
    reward_funcs=[right_number, think_format_reward, get_soft_overlong_punishment(256, 64)],
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()
