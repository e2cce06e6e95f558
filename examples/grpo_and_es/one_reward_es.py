"""The plain case: a model by its name, a dataset, a reward function."""

from datasets import load_dataset
from es_trainer import ESConfig, ESTrainer


dataset = load_dataset("trl-lib/tldr", split="train")


# Rewards completions whose length is close to 20 characters
def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]


training_args = ESConfig(output_dir="Qwen2.5-0.5B-tldr", max_completion_length=64, logging_steps=1)
trainer = ESTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs=reward_len,
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()
