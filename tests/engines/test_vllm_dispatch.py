"""Jobs and servers that help each other. The servers do what a test says, in real threads."""

import threading

import pytest

from es_trainer.engines import vllm_dispatch
from es_trainer.engines.vllm_client import Cancelled, ServerError, ServerLost
from es_trainer.engines.vllm_dispatch import Job, JobQueue, dispatch


class Server:
    def __init__(self, number):
        self.url = f"server {number}"
        self.connected, self.late, self.last_error = True, False, ""
        self.lock = threading.Lock()
        self.cancelled = threading.Event()

    def cancel(self):
        self.cancelled.set()

    def hang(self):
        """Complete nothing until it is cancelled."""
        assert self.cancelled.wait(20)
        self.cancelled.clear()
        raise Cancelled(self.url)

    def lose(self, error):
        self.connected, self.last_error = False, str(error)


class Servers:
    def __init__(self, count):
        self.servers = [Server(i) for i in range(count)]

    def catch_up(self, server):
        return True

    def none_left(self):
        return ServerError("none left")


def jobs_of(members, prompts):
    return [Job((member,), range(prompts)) for member in range(members)]


def answered(done):
    """Members and prompts that were answered, each as often as it was."""
    return sorted((member, prompt) for job in done for member in job.members for prompt in job.prompts)


def every(members, prompts):
    return [(member, prompt) for member in range(members) for prompt in range(prompts)]


def test_shares_are_all_of_a_job():
    job = Job((3, 4), range(2, 12))
    assert job.size == 20
    assert [share.prompts for share in job.shares(4)] == [range(2, 6), range(6, 10), range(10, 12)]
    assert job.shares(10) == [job]


@pytest.mark.parametrize("splits", [True, False])
def test_members_are_shared_out_if_they_are_fewer_than_servers(splits):
    servers = Servers(6)
    begun = threading.Barrier(6 if splits else 2, timeout=20)  # all of them work at the same time

    def do(job, server):
        begun.wait()
        return job

    done = list(dispatch(servers, jobs_of(2, 9), do, splits=splits, repeats=False))
    assert answered(done) == every(2, 9)
    assert sorted(job.size for job in done) == ([3] * 6 if splits else [9, 9])


def test_members_are_whole_while_there_are_enough():
    jobs = JobQueue(jobs_of(3, 4), servers=2, splits=True, repeats=True)
    one, two = Servers(2).servers
    first, second = jobs.get(one), jobs.get(two)
    assert [first.job, second.job] == jobs_of(2, 4)
    assert jobs.task_done(first, "a") == [(first.job, "a")]
    assert jobs.get(one).job == Job((2,), range(4))  # as only one server is free


def test_a_server_that_has_left_is_not_counted_on():
    jobs = JobQueue(jobs_of(1, 4), servers=2, splits=True, repeats=True)
    jobs.leave()
    assert jobs.get(Server(0)).job == Job((0,), range(4))


def test_a_job_that_was_given_back_is_done_by_another():
    jobs = JobQueue(jobs_of(2, 1), servers=2, splits=False, repeats=False)
    one, two = Servers(2).servers
    first, second = jobs.get(one), jobs.get(two)
    found = []

    def work():
        while (attempt := jobs.get(two)) is not None:
            found.append(attempt.job)
            jobs.task_done(attempt, None)

    other = threading.Thread(target=work)
    other.start()
    jobs.task_done(second, None)
    other.join(0.1)
    assert other.is_alive() and not found  # the first job may come back
    jobs.put_back(first)
    other.join(5)
    assert found == [first.job] and not other.is_alive() and not jobs.unfinished


def test_stopped_jobs():
    jobs = JobQueue(jobs_of(3, 1), servers=1, splits=True, repeats=True)
    server = Server(0)
    attempt = jobs.get(server)
    jobs.shutdown()
    assert server.cancelled.is_set() and jobs.get(server) is None and not jobs.unfinished
    assert jobs.task_done(attempt, None) == []


def test_servers_help_one_that_takes_too_long():
    servers = Servers(4)
    slow = servers.servers[0]
    held = threading.Event()

    def do(job, server):
        if server is slow:
            held.set()
            server.hang()
        assert held.wait(20)  # so that it has a member
        return job, server

    done = list(dispatch(servers, jobs_of(5, 8), do, splits=False, repeats=True))
    assert answered(job for job, _ in done) == every(5, 8)
    assert slow not in [server for _, server in done] and slow.late
    assert sorted(job.size for job, _ in done) == [2, 3, 3, 8, 8, 8, 8]
    assert slow.lock.acquire(timeout=5)  # it is free again


def test_the_first_answer_counts_once():
    """Helpers are cancelled if the server that takes too long answers first."""
    servers = Servers(3)
    slow, *others = servers.servers
    held, helped = threading.Event(), threading.Barrier(3, timeout=20)
    calls = []

    def do(job, server):
        calls.append(job)
        if server is slow:
            held.set()
            helped.wait()
            return job
        assert held.wait(20)
        if len(job.prompts) < 6:  # a share of the slow one's
            helped.wait()
            server.hang()
        return job

    done = list(dispatch(servers, jobs_of(4, 6), do, splits=False, repeats=True))
    assert answered(done) == every(4, 6) and all(job.size == 6 for job in done)
    assert len(calls) == 6 and not any(server.late for server in servers.servers)
    assert all(server.lock.acquire(timeout=5) for server in others)


def test_a_server_goes_on_after_it_was_cancelled():
    servers = Servers(3)
    helper = servers.servers[2]
    held, again = threading.Barrier(3, timeout=20), threading.Event()
    calls = dict.fromkeys(servers.servers, 0)

    def do(job, server):
        calls[server] += 1
        if calls[server] == 1:
            held.wait()  # each has a member
        if server is not helper:
            if calls[server] == 1:
                server.hang()
            again.set()
        elif calls[server] > 3:  # after two shares of one of the others
            assert again.wait(20)
        return job

    done = list(dispatch(servers, jobs_of(3, 4), do, splits=False, repeats=True))
    assert answered(done) == every(3, 4) and again.is_set()


def test_nothing_with_side_effects_is_begun_twice():
    servers = Servers(2)
    slow = servers.servers[0]
    held, last = threading.Event(), threading.Event()
    calls = []

    def do(job, server):
        calls.append(job)
        if server is slow:
            held.set()
            assert not last.wait(0.5)  # many times what the others take
        assert held.wait(20)
        return job

    done = list(dispatch(servers, jobs_of(6, 4), do, splits=True, repeats=False))
    assert answered(done) == every(6, 4) and answered(calls) == every(6, 4)


@pytest.mark.parametrize("lost", ["slow", "helper"])
def test_a_server_that_is_lost_while_it_is_helped(lost):
    servers = Servers(3)
    slow, first, second = servers.servers
    held, helping = threading.Event(), threading.Event()

    def do(job, server):
        if server is slow:
            held.set()
            assert helping.wait(20)
            if lost == "slow":
                raise ServerLost("gone")
            server.hang()
        assert held.wait(20)
        if len(job.prompts) < 6 and not helping.is_set():
            helping.set()
            if lost == "helper":
                raise ServerLost("gone")
            server.hang()
        return job

    done = list(dispatch(servers, jobs_of(4, 6), do, splits=False, repeats=True))
    assert answered(done) == every(4, 6)
    assert [server.connected for server in servers.servers].count(False) == 1


def test_a_job_takes_too_long_by_its_size(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(vllm_dispatch.time, "monotonic", lambda: now[0])
    jobs = JobQueue([Job((0,), range(10)), Job((1,), range(5)), Job((2,), range(10))], 3, True, True)
    one, two, three = Servers(3).servers
    first, second, third = jobs.get(one), jobs.get(two), jobs.get(three)
    now[0] = 20.0
    jobs.task_done(first, None)  # 2 seconds a prompt
    assert jobs._until_too_long() == 0.0  # the shorter one, after 2 * 2 * 5 seconds
    helper = jobs.get(one)
    assert helper.helps is second and helper.job == Job((1,), range(3))
    assert jobs.task_done(jobs.get(one), None) == []
    assert jobs.task_done(helper, None) != []
    assert jobs._until_too_long() == pytest.approx(20.0)  # the longer one
    now[0] = 40.0
    assert jobs.get(one).helps is third
