"""Two processes whose group has a timeout of two seconds: `two_processes.py RANK PORT`. Prints what came of it."""

import json
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from es_trainer.run.processes import Processes


RANK, PORT = map(int, sys.argv[1:])
SLOW = 4  # seconds

store = dist.TCPStore("127.0.0.1", PORT, 2, is_master=RANK == 0)
dist.init_process_group("gloo", store=store, rank=RANK, world_size=2, timeout=timedelta(seconds=2))
processes = Processes()
processes.barrier()
store.set_timeout(timedelta(seconds=2))
keys = store.num_keys()

replies = processes.exchange(lambda: time.sleep(SLOW * RANK) or RANK)

with processes.queue(3) as queue:
    alone = [item for taken in iter(queue.take, range(3, 3)) for item in taken]
with processes.queue(3, group_size=2) as queue:
    together = []
    while taken := queue.take():
        together += taken
        if RANK == 0 and len(together) == 1:
            time.sleep(SLOW)  # as for a reward, which the other does not wait for
alone = processes.exchange(lambda: alone)
together = processes.exchange(lambda: together)
print(json.dumps([replies, sorted(sum(alone, [])), together, store.num_keys() - keys]))
processes.barrier()
