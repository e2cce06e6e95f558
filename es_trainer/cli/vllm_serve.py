"""`es-trainer vllm-serve`"""

import hmac
import ipaddress
import os
import sys
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


OPEN = {"/health"}  # what anyone may ask


def main(argv: list[str]) -> None:
    """Become vLLM's own API server, with what evolution strategies need."""
    parser = ArgumentParser(
        "es-trainer vllm-serve",
        description="Start a vLLM server for ESConfig(use_vllm=True, vllm_mode='server').",
        epilog="Further options are those of `vllm serve`, such as --dtype, --tensor-parallel-size, --max-model-len "
        "and --gpu-memory-utilization.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="Name or folder of the model that is to be trained.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on (default: 127.0.0.1).")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on (default: 8000).")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        help="Token that a trainer has to have in its environment, as VLLM_API_KEY. By default it is read from there. "
        "Needed for every address but that of this machine itself.",
    )
    arguments, others = parser.parse_known_args(argv)
    if not arguments.api_key and not is_loopback(arguments.host):
        parser.error(
            f"--host {arguments.host} can be reached from other machines, and whoever reaches it could change the "
            "weights: set VLLM_API_KEY to a secret, here and where the trainer runs, or leave --host out."
        )
    from ..engines.vllm_version import check_version

    check_version()
    environment, command = server_command(arguments.model, arguments.host, arguments.port, arguments.api_key, others)
    os.environ.update(environment)
    os.execv(command[0], command)


def server_command(
    model: str, host: str, port: int, token: str | None, others: list[str]
) -> tuple[dict[str, str], list[str]]:
    """Environment variables and command line of a server."""
    import torch

    from ..engines.vllm_engine import WORKER_EXTENSION
    from ..engines.vllm_members import Members

    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # which serves calls of workers' methods
    if "--enable-lora" in others:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # which names the adapters that members are
    if token:
        environment["VLLM_API_KEY"] = token
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--host", host, "--port", str(port)]
    command += ["--worker-extension-cls", WORKER_EXTENSION]
    command += ["--middleware", f"{Members.__module__}.{Members.__name__}"]
    # The last is asked first. vLLM's own check of tokens leaves out the workers' methods
    command += ["--middleware", f"{__name__}.require_token"]
    command += ["--generation-config", "vllm"]  # the trainer says all there is to say
    if not torch.cuda.is_available():
        command.append("--enforce-eager")  # compilation takes minutes on CPU, and saves nothing there
        environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return environment, [*command, *others]


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def require_token(request: "Request", call_next: Callable[[Any], Awaitable["Response"]]) -> "Response":
    """Answer requests that have the token, if there is one."""
    from starlette.responses import JSONResponse

    token = os.environ.get("VLLM_API_KEY")
    authorization = request.headers.get("Authorization", "")
    if (
        token
        and request.url.path not in OPEN
        and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode())
    ):
        return JSONResponse({"error": "Unauthorized"}, status_code=401)
    return await call_next(request)
