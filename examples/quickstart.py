"""
Teach SmolLM2-135M-Instruct to answer briefly, by evolution strategies alone, on two CPU cores in some minutes:
two to three with a fast processor to itself, many more with a slow one.

Run with `make quickstart`. Writes the history, a plot of the rewards and the trained model to `quickstart/`.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from es_trainer import ESConfig, ESTrainer
from es_trainer.smollm2 import smollm2
from es_trainer.tasks import Task, conciseness


OUTPUT = Path("quickstart")
NEXT = """
What next?

1. Your own reward. This one asks for the right answer, and for a short one. Give it to the trainer as `reward_funcs`:

       def right_and_brief(completions, answer, **columns):  # each column of the dataset is an argument
           texts = [completion[0]["content"] for completion in completions]
           right = [word.strip(".").lower() in text.lower() for word, text in zip(answer, texts)]
           return [100.0 * is_right - len(text) for is_right, text in zip(right, texts)]

2. Your GRPO script. Change one name, `GRPOTrainer` to `ESTrainer`, and import it from es_trainer. docs/grpo.md says
   what differs, and examples/notebooks/from_grpo.ipynb goes through it.
3. The documentation. docs/tuning.md says which settings matter, docs/monitoring.md whether a run learns,
   docs/rewards.md more about rewards, docs/agents.md all about tools and agents. README.md lists the other pages.
"""


def main() -> None:
    task = conciseness()
    model_folder = smollm2()
    args = ESConfig(
        output_dir=str(OUTPUT),
        population_size=32,
        perturbation="low_rank",
        sigma=0.01,
        learning_rate=0.02,
        num_prompts_per_step=8,
        max_completion_length=16,
        max_steps=8,
        per_device_eval_batch_size=16,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
    )
    trainer = ESTrainer(
        model=model_folder,
        reward_funcs=task.reward_funcs,
        args=args,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
    )

    before = answers(trainer, task)
    trainer.train()
    after = answers(trainer, task)
    trainer.save_model(str(OUTPUT / "model"))

    show(task, before, after)
    rewards = [log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log]
    print(f"Held-out reward: {rewards[0]:.1f} before, {rewards[-1]:.1f} after {args.max_steps} updates (best: 0.0).")
    print(f"Rewards are plotted in {OUTPUT / 'reward.png'}; the model is in {OUTPUT / 'model'}.")
    load_and_ask(OUTPUT / "model", "What is the capital of Poland?")
    print(NEXT)


def answers(trainer: ESTrainer, task: Task) -> list[str]:
    prompt_ids = trainer.engine.tokenize(list(task.eval_dataset["prompt"]))
    return [completion.text for completion in trainer.engine.generate(prompt_ids, seed=0)]


def show(task: Task, before: list[str], after: list[str]) -> None:
    table = Table(title="Held-out questions (answers are cut at 16 tokens)", show_lines=True)
    for column in ("Question", "Reference", "Before", "After"):
        table.add_column(column)
    for row, old, new in zip(task.eval_dataset, before, after, strict=True):
        table.add_row(row["prompt"][0]["content"], row["answer"], old, new)
    Console().print(table)


def load_and_ask(folder: Path, question: str) -> None:
    """Load the saved model like any other and let it answer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"Loaded again from {folder}: {question!r} -> {answer!r}")


if __name__ == "__main__":
    main()
