"""What one program does with one model."""

import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engines.requests import Request
from ..engines.sampling import derived_seed


@dataclass(eq=False)
class Session:
    """
    A program's access to a model.

    Args:
        model (`str`):
            The model's name, such as `"member-17"`.
        member (`int`):
            Number of the member in the group that is installed.
        seed (`int`):
            Seed of the random numbers of its calls, common to all members.
    """

    model: str
    member: int
    seed: int
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    calls: list[dict[str, Any]] = field(default_factory=list)  # messages, reply, seconds, finish_reason, usage
    completion_ids: list[list[int]] = field(default_factory=list)  # of each call
    requests: set[Request] = field(default_factory=set)  # that are being answered
    cache: Any = None  # keys and values of the last call, which the next may go on from
    ask: Callable[[Request], None] | None = None  # of the thread that generates
    closed: str | None = None  # why no more calls are answered
    _asked: int = 0
    _children: set[subprocess.Popen] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_seed(self) -> int:
        """Seed of the next call: it follows from the number of the call."""
        self._asked += 1
        return derived_seed(self.seed, self._asked)

    def run(self, command: Sequence[str] | str, environment: dict[str, str], options: dict[str, Any]) -> Any:
        """Run a subprocess that ends with the session; see [`Endpoint.run`]."""
        check, timeout = options.pop("check", False), options.pop("timeout", None)
        input_ = options.pop("input", None)
        if input_ is not None:
            options["stdin"] = subprocess.PIPE
        if options.pop("capture_output", False):
            options["stdout"] = options["stderr"] = subprocess.PIPE
        options["env"] = {**(options.get("env") or os.environ), **environment}
        with self._lock:
            if self.closed is not None:
                raise RuntimeError(self.closed)
            child = subprocess.Popen(command, start_new_session=True, **options)
            self._children.add(child)
        try:
            output, errors = child.communicate(input_, timeout)
        finally:
            _kill(child)  # what is left of its process group, too
            child.wait()
            self._children.discard(child)
        if check and child.returncode:
            raise subprocess.CalledProcessError(child.returncode, command, output, errors)
        return subprocess.CompletedProcess(command, child.returncode, output, errors)

    def close(self, reason: str) -> None:
        """Answer no more calls, and end the program's subprocesses."""
        with self._lock:
            self.closed = reason
            for child in list(self._children):
                _kill(child)


class Endpoint:
    """
    Where a program finds its model, for any client of OpenAI's API.

    Args:
        base_url (`str`):
            Address of the API, such as `"http://127.0.0.1:34567/v1"`.
        session ([`Session`]):
            The program's session.

    Attributes:
        base_url (`str`):
            Address of the API.
        api_key (`str`):
            Key of this program.
        model (`str`):
            Name of its model, such as `"member-17"`, or `"policy"` for the unperturbed weights.
    """

    def __init__(self, base_url: str, session: Session):
        self.base_url = base_url
        self.api_key = session.key
        self.model = session.model
        self._session = session

    @property
    def has_called(self) -> bool:
        """Whether the model has answered a call of the program."""
        return bool(self._session.calls)

    @property
    def environment(self) -> dict[str, str]:
        """The three as environment variables: `OPENAI_BASE_URL`, `OPENAI_API_KEY` and `OPENAI_MODEL`."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key, "OPENAI_MODEL": self.model}

    def run(self, command: Sequence[str] | str, **options: Any) -> subprocess.CompletedProcess:
        """
        Run a subprocess with `environment` in its environment variables. It ends, with all processes that it has
        started, when the program's time is over.

        Args:
            command (`Sequence[str]` or `str`):
                The command.
            **options:
                As in [`subprocess.run`].

        Returns:
            `subprocess.CompletedProcess`: what [`subprocess.run`] returns.
        """
        return self._session.run(command, self.environment, options)


def _kill(child: subprocess.Popen) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
