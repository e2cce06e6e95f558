"""What can be seen on one process; the rest is in test_distributed.py."""

import pytest

from es_trainer.processes import Processes, Queue


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
