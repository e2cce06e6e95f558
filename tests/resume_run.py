"""One training run in a process of its own: `python resume_run.py MODEL OUTPUT KILL_AT [CHECKPOINT]`."""

import json
import os
import signal
import sys

from conftest import letters, make_tokenizer
from datasets import Dataset

from es_trainer import ESConfig, ESTrainer


model, output, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint = sys.argv[4] if len(sys.argv) > 4 else None
seen = open(f"{output}.seen", "a")
members = 0


def reward(prompts, completions, trainer_state, **kwargs):
    """Notes the prompts, and kills the process in the middle of a step."""
    global members
    seen.write(json.dumps([trainer_state.global_step, prompts]) + "\n")
    seen.flush()
    members = members + 1 if trainer_state.global_step == kill_at else 0
    if members == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return letters(completions)


trainer = ESTrainer(
    model,
    reward,
    ESConfig(
        output,
        use_cpu=True,
        bf16=True,
        population_size=6,
        sigma=0.05,
        learning_rate=0.02,
        es_optimizer="adam",
        anchor_decay=0.1,
        num_prompts_per_step=2,
        num_generations=2,
        temperature=1.0,
        max_completion_length=8,
        max_steps=8,
        logging_steps=3,  # does not divide save_steps: a log spans the break
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        eval_kl_prompts=1,
        lr_scheduler_type="linear",
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list([{"prompt": f"Say {word}"} for word in "one two three four five".split()]),
    eval_dataset=Dataset.from_list([{"prompt": "Say six"}]),
    processing_class=make_tokenizer(),
)
trainer.train(resume_from_checkpoint=checkpoint)
trainer.save_model(f"{output}/final")
