"""A run on pictures in each process of a launcher: `images_run.py FOLDER`."""

import sys

import torch
from conftest import TINY_RUN, letters
from tiny_vision import make_tiny, with_pictures

from es_trainer import ESConfig, ESTrainer


torch.set_num_threads(1)
model, processor = make_tiny("qwen2_5_vl")
args = ESConfig(sys.argv[1], **TINY_RUN, temperature=1.0, eval_strategy="steps", eval_steps=1)
trainer = ESTrainer(model, letters, args, with_pictures(), with_pictures(2, first=8), processor)
trainer.train()
trainer.save_model(f"{sys.argv[1]}/final")
