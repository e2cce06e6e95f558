"""The models that runs begin with, which are all SmolLM2-135M-Instruct."""

import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from es_trainer.smollm2 import smollm2
from es_trainer.tasks import conciseness


TUNED = Path(__file__).with_name("results") / "sft-model"  # not committed: made anew where it is missing


def as_it_is() -> dict[str, Any]:
    """All weights of the instruct model."""
    return {"model": smollm2()}


def after_sft() -> dict[str, Any]:
    """All weights, after an epoch of supervised fine-tuning on the 48 questions and answers of conciseness."""
    if not TUNED.exists():
        rows = conciseness().train_dataset
        answers = [[{"role": "assistant", "content": answer}] for answer in rows["answer"]]
        dataset = Dataset.from_dict({"prompt": rows["prompt"], "completion": answers})
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(
                output_dir=folder,
                use_cpu=True,
                learning_rate=1e-5,
                num_train_epochs=1,
                per_device_train_batch_size=8,
                save_strategy="no",
                report_to="none",
            )
            trainer = SFTTrainer(smollm2(), args, train_dataset=dataset)
            trainer.train()
        trainer.save_model(str(TUNED))
    return {"model": str(TUNED)}


def with_lora() -> dict[str, Any]:
    """An adapter of rank 8 on all linear layers, and not the model's own weights."""
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"model": smollm2(), "peft_config": adapter}


STARTS = {"as it is": as_it_is, "sft": after_sft, "lora": with_lora}
