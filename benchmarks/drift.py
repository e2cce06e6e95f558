"""
What `master_weights="none"` leaves in the weights after one population, in bfloat16: `python benchmarks/drift.py`.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from es_trainer.evolution import EvolutionStrategy
from es_trainer.smollm2 import smollm2


@torch.no_grad()
def main(population: int = 30) -> None:
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    for master_weights in ("device", "none"):
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            before = model(**inputs).logits.float()
            optimizer = EvolutionStrategy(
                list(model.named_parameters()), population_size=population, master_weights=master_weights
            )
            start = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
            for member in optimizer.ask():
                optimizer.perturb(member)
            optimizer.restore()
            changed = sum(int((p.data != start[name]).sum()) for name, p in model.named_parameters())
            total = sum(p.numel() for p in model.parameters())
            drift = float((model(**inputs).logits.float() - before).abs().max())
            print(
                f'master_weights="{master_weights}", {dtype}: after {population} members '
                f"{changed / total:.1%} of the weights differ, logits by up to {drift:.2g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
