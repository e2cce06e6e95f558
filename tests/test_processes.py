"""What can be seen on one process; the rest is in test_distributed.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from test_distributed import ENVIRONMENT, free_port

from es_trainer.run import processes
from es_trainer.run.processes import Processes, Queue


def test_a_queue_gives_each_item_once():
    queue = Queue(7)
    taken = [queue.take(3), queue.take(3), queue.take(3), queue.take(3)]
    assert taken == [range(0, 3), range(3, 6), range(6, 7), range(7, 7)]
    assert not taken[-1]


def test_an_error_ends_a_queue():
    queue = Queue(7)
    with pytest.raises(KeyError), queue:
        queue.take()
        raise KeyError
    assert not queue.take()


def test_one_process_exchanges_with_itself():
    processes = Processes()
    assert (processes.rank, processes.count) == (0, 1)
    assert processes.exchange(lambda: 3) == [3]
    with pytest.raises(KeyError):
        processes.exchange(lambda: {}["missing"])
    processes.agree({"seed": 1})
    processes.barrier()


def test_two_processes_wait_for_each_other_and_leave_nothing():
    """Members take longer than the timeout of the process group, and a run has many queues."""
    script, port = Path(__file__).with_name("two_processes.py"), str(free_port())
    started = [
        subprocess.Popen([sys.executable, script, str(rank), port], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == [[0, 1], [0, 1, 2], [[0, 1, 2], [0, 1, 2]], 0]


def test_numbers_travel_from_cpu_to_cpu(monkeypatch):
    """Whatever the backend of the run: NCCL ends the program when a process waits longer than `ddp_timeout`."""
    groups, used = [], []

    def gather(replies, mine, group):
        used.append(group)
        replies[:] = [mine, mine]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes, "_get_default_store", dist.HashStore)
    monkeypatch.setattr(dist, "new_group", lambda **options: groups.append(options) or "numbers")
    monkeypatch.setattr(dist, "all_gather_object", gather)
    processes._numbers_group.cache_clear()
    try:
        assert Processes().exchange(lambda: 3) == [3, 3] == Processes().exchange(lambda: 3)
    finally:
        processes._numbers_group.cache_clear()
    assert groups == [{"backend": "gloo", "timeout": processes.PATIENCE}] and used == ["numbers"] * 2
    assert processes.PATIENCE.total_seconds() >= 24 * 3600
