"""An agent by the openai client: it answers, doubts its answer, and writes it anew. What counts is the last one."""

import openai
from datasets import Dataset
from es_trainer import ESConfig, ESTrainer


QUESTIONS = {
    "What is the capital of France?": "Paris",
    "How many legs does a spider have?": "eight",
    "Which planet is the largest?": "Jupiter",
    "What is frozen water called?": "ice",
}


async def answer_twice(example, endpoint):
    async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        messages = [{"role": "user", "content": example["question"]}]
        for instruction in ("What could be wrong with that?", "Now give the final answer, in one word.", None):
            reply = await client.chat.completions.create(model=endpoint.model, messages=messages, max_tokens=32)
            answer = reply.choices[0].message.content
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": instruction}]
    right = example["answer"].lower() in answer.lower()
    return {"reward": {"right": float(right), "brief": -0.01 * len(answer)}, "answer": answer}


trainer = ESTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=ESConfig(output_dir="Qwen2.5-0.5B-twice", max_completion_length=32, agent_timeout=120.0),
    train_dataset=Dataset.from_list([{"question": q, "answer": a} for q, a in QUESTIONS.items()]),
    agent_func=answer_twice,
)
trainer.train()
trainer.save_model()
