"""One of two processes that save their parts of a state: `save_parts.py RANK PORT FOLDER`."""

import sys
from pathlib import Path

import torch.distributed as dist
from test_engine_weights import LowRank, make, step

from es_trainer.run.checkpoint import save_state


RANK, PORT, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

store = dist.TCPStore("127.0.0.1", PORT, 2, is_master=RANK == 0)
dist.init_process_group("gloo", store=store, rank=RANK, world_size=2)
_, optimizer = make(LowRank(2), RANK, rule="adam", anchor_decay=0.1)
step(optimizer)
save_state(FOLDER, optimizer, together=True, first=RANK == 0)
dist.barrier()
