"""Files in memory, as another process sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from astuner.backbone.verl_cpu.memory_file import MemoryFile
from astuner.engine.embedded.received import write_weights

pytestmark = pytest.mark.timeout(60)

READ = """
import sys, torch
content = torch.load(sys.argv[1], mmap=True, weights_only=True)
print(content["version"], content["weights"]["x"].sum().item())
"""


def test_another_process_reads_it_and_it_leaves_nothing() -> None:
    with MemoryFile("astuner-test") as file:
        write_weights(file.path, [("x", torch.full((1000,), 2.0))], version=3)
        path = file.path
        read = [sys.executable, "-c", READ, str(path)]
        out = subprocess.run(read, capture_output=True, text=True, timeout=50, check=True)
        assert out.stdout.split() == ["3", "2000.0"]
    assert not path.exists()
    assert not [p for p in Path("/dev/shm").iterdir() if "astuner-test" in p.name]


def test_it_dies_with_its_process() -> None:
    make = (
        "import sys, time\n"
        "from astuner.backbone.verl_cpu.memory_file import MemoryFile\n"
        "file = MemoryFile('x'); file.path.write_text('hello')\n"
        "print(file.path, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", make], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        path = Path(owner.stdout.readline().strip())
        assert path.read_text() == "hello"
        owner.kill()
        owner.wait(10)
        assert not path.exists()
