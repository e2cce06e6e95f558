"""An adapter instead of all weights, and held-out prompts."""

from datasets import load_dataset
from peft import LoraConfig
from es_trainer import ESConfig, ESTrainer


dataset = load_dataset("trl-lib/tldr")


def few_different_words(completions, **kwargs):
    return [-float(len(set(completion.lower().split()))) for completion in completions]


training_args = ESConfig(
    output_dir="Qwen2.5-0.5B-tldr-lora",
    max_completion_length=64,
    eval_strategy="steps",
    eval_steps=50,
    logging_steps=1,
)
trainer = ESTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs=few_different_words,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["validation"].select(range(16)),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
