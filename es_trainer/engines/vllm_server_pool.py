"""vLLM servers that do jobs of a run, whatever they have of its weights."""

import threading
import time
from abc import ABC, abstractmethod

from ..config import ESConfig
from .vllm_client import ServerError, ServerLost, VLLMClient


class Server(VLLMClient):
    """A vLLM server of a run."""

    def __init__(self, url: str, timeout: float):
        super().__init__(url, timeout)
        self.connected = False  # whether it is known what it has
        self.late = False  # whether others did its last job
        self.lock = threading.Lock()  # held by the thread that talks to the server

    def lose(self, error: ServerLost) -> None:
        """Note that the server is lost: it has to connect again before it gets work."""
        self.connected, self.last_error = False, str(error)


class ServerPool(ABC):
    """
    The servers of a run.

    Args:
        args ([`ESConfig`]):
            The fields that begin with `vllm_server_`.

    Raises:
        `ConnectionError`: If a server is not up within `args.vllm_server_timeout`.
    """

    server_kind = Server

    def __init__(self, args: ESConfig):
        self.args = args
        urls = args.vllm_server_base_url or [f"http://{args.vllm_server_host}:{args.vllm_server_port}"]
        self.servers = [self.server_kind(url, args.vllm_server_timeout) for url in urls]
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.args.vllm_server_timeout
        while missing := [server for server in self.servers if not server.is_up()]:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"No vLLM server is up at {', '.join(server.url for server in missing)} after "
                    f"vllm_server_timeout={self.args.vllm_server_timeout} s ({missing[0].last_error}). Start it with "
                    "`es-trainer vllm-serve --model ...`."
                )
            time.sleep(1)

    def connect(self, server: Server) -> None:
        """Find out what a server has, or make it ready for the run."""
        server.connected = True

    @abstractmethod
    def catch_up(self, server: Server) -> bool:
        """Have a server do the next of what it has missed. Returns whether there was nothing."""

    def none_left(self) -> ServerError:
        """The error that no server is left, with the last error of each."""
        errors = "\n".join(f"{server.url}: {server.last_error}" for server in self.servers)
        return ServerError(
            f"No vLLM server is left. Start them again, and the run with `resume_from_checkpoint=True`.\n{errors}"
        )
