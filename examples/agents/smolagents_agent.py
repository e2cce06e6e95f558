"""An agent of smolagents that calls a tool. It is trained as it is: it only has to be told where its model is."""

from datasets import Dataset
from es_trainer import ESConfig, ESTrainer
from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def population(city: str) -> int:
    """
    Number of people who live in a city.

    Args:
        city: Name of the city.
    """
    return {"Paris": 2_048_472, "Rome": 2_746_984, "Oslo": 717_710}.get(city, 0)


def look_up(example, endpoint):
    model = OpenAIServerModel(endpoint.model, api_base=endpoint.base_url, api_key=endpoint.api_key)
    agent = ToolCallingAgent(tools=[population], model=model, max_steps=3, verbosity_level=0)
    answer = agent.run(f"How many people live in {example['city']}?")
    return {"reward": float(str(example["people"]) in str(answer).replace(",", "")), "answer": str(answer)}


trainer = ESTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=ESConfig(output_dir="Qwen2.5-0.5B-cities", max_completion_length=256, agent_errors="none"),
    train_dataset=Dataset.from_list(
        [
            {"city": "Paris", "people": 2_048_472},
            {"city": "Rome", "people": 2_746_984},
            {"city": "Oslo", "people": 717_710},
        ]
    ),
    agent_func=look_up,
)
trainer.train()
trainer.save_model()
