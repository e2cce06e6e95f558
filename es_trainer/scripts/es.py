"""
Train a language model with evolution strategies.

`es-trainer train` launches this script. To change more than options can, copy it and run the copy:

python es.py --config config.yaml
accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml es.py --config config.yaml

python es.py \
    --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
    --task conciseness \
    --perturbation low_rank \
    --sigma 0.01 \
    --learning_rate 0.02 \
    --max_completion_length 32 \
    --max_steps 20 \
    --output_dir SmolLM2-brief
"""

from dataclasses import field, make_dataclass

from es_trainer.paths import check_local
from es_trainer.scripts.arguments import Parser
from es_trainer.scripts.data import ESScriptArguments, check_data, load_agent, load_data, pick_split
from es_trainer.scripts.mistakes import error_in_one_line


def main(script_args, training_args, model_args, dataset_args):
    train(make_trainer(script_args, training_args, model_args, dataset_args), script_args.dataset_name)


def make_trainer(script_args, training_args, model_args, dataset_args, trainer_class=None):
    from trl import get_peft_config, get_quantization_config

    from es_trainer import ESTrainer
    from es_trainer.backends import TrainerInputs, check_mode

    trainer_class = trainer_class or ESTrainer
    check(script_args, training_args, model_args, dataset_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    quantization_config, peft_config = get_quantization_config(model_args), get_peft_config(model_args)
    check_mode(training_args, TrainerInputs(model_args.model_name_or_path, quantization_config, peft_config))

    # Load the datasets, the reward functions and the program
    dataset, reward_funcs = load_data(script_args, dataset_args)
    train_dataset = pick_split(dataset, "dataset_train_split", script_args.dataset_train_split)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = pick_split(dataset, "dataset_test_split", script_args.dataset_test_split)

    return trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_config,
        peft_config=peft_config,
        agent_func=load_agent(script_args.agent),
    )


def train(trainer, dataset_name):
    # Train the model; `--resume_from_checkpoint true` goes on from the last checkpoint
    resume = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.accelerator.print("✅ Training completed.")

    # Save and push to Hub
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"💾 Model saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")

    # Finish the trackers and destroy the process group
    trainer.end()


def check(script_args, training_args, model_args, dataset_args):
    """What can be told before anything is loaded."""
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: give the name or folder of a causal language model.")
    check_local("model_name_or_path", model_args.model_name_or_path, folder=True)
    check_data(script_args, dataset_args)


def make_parser(prog: str | None = None) -> Parser:
    from trl import DatasetMixtureConfig, ModelConfig

    from es_trainer import ESConfig

    # Which ModelConfig has, too, in older versions of TRL
    not_here = [("trust_remote_code", bool, field(default=False, init=False))]
    model_config = make_dataclass("ModelConfig", not_here, bases=(ModelConfig,))
    return Parser((ESScriptArguments, ESConfig, model_config, DatasetMixtureConfig), prog=prog, launched=True)


if __name__ == "__main__":
    with error_in_one_line("es.py"):
        # Options of `accelerate launch` may stand in the YAML file, too
        arguments = make_parser().parse_args_and_config(fail_with_unknown_args=False)
        trainer = make_trainer(*arguments)
    train(trainer, arguments[0].dataset_name)
