import platform
import subprocess
import sys

import torch

from es_trainer import __version__
from es_trainer.cli import main


def test_versions_and_devices(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"- es_trainer: {__version__}" in lines
    assert f"- python: {platform.python_version()}" in lines
    assert any(line.startswith("- torch: ") and "not installed" not in line for line in lines)
    assert any(line.startswith("- memory: ") and line.endswith(" GiB") for line in lines)
    (cpu,) = [line for line in lines if line.startswith("- CPU: ")]
    assert cpu.endswith(torch.backends.cpu.get_cpu_capability())
    (gpus,) = [line for line in lines if line.startswith("- GPUs: ")]
    assert (gpus == "- GPUs: none") == (torch.cuda.device_count() == 0)
    names = [line.split(":")[0] for line in lines if line.startswith("- ")]
    assert {"- numba", "- triton", "- deepspeed", "- vllm", "- bitsandbytes", "- accelerate config"} <= set(names)


def test_a_package_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("es_trainer.cli.env.PACKAGES", ("no-such-package",))
    main(["env"])
    assert "- no-such-package: not installed\n" in capsys.readouterr().out


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "es_trainer.cli", "env"], capture_output=True, text=True, check=True
    )
    assert "- es_trainer: " in result.stdout
