"""`benchmarks/gpu.py`, which `make gpu` runs, on the CPU with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(folder: Path) -> str:
    sizes = ["--sizes", "tiny", "--weights", "8192", "--populations", "3", "4", "--prompts", "2", "--tokens", "4"]
    files = ["--results", folder / "gpu.jsonl", "--report", folder / "RESULTS.md"]
    command = [sys.executable, SCRIPT, *sizes, "--rounds", "1", *files]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_every_part_runs_once_and_is_reported(tmp_path):
    report = tmp_path / "RESULTS.md"
    report.write_text("# Before\n\nkept\n\n# After\n\nkept, too\n")
    run(tmp_path)
    lines = (tmp_path / "gpu.jsonl").read_text().splitlines()
    figures = {line["part"]: line["figures"] for line in map(json.loads, lines)}
    assert len(figures) == len(lines) == 8
    written = report.read_text()
    assert written.startswith("# Before\n\nkept\n\n# After\n\nkept, too\n\n# Figures of ")
    for part, own in figures.items():
        assert own, part
        for what, figure in own.items():
            assert f"| {part} | {what} | {figure} |" in written

    (tmp_path / "gpu.jsonl").write_text("\n".join(lines[1:]) + "\n")  # as if the first part had not been done
    again = run(tmp_path)
    assert again.count("done before") == 7 and "\nkernels (" in again
    assert report.read_text().count("# Figures of ") == 1
