import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def children_end_with() -> Callable[..., None]:
    """A function that kills `python WORDS` once it has two children, and asserts that these end too. On Linux."""

    def check(*words: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL)
        children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 120
        while len(found := children.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
        while any(Path(f"/proc/{child}").exists() for child in found) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(found) == 2 and not any(Path(f"/proc/{child}").exists() for child in found)

    return check
