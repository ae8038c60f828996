"""A function of a bench module in several processes that torchrun starts on this machine.

together(processes, function, *arguments)    what it returns on each of them, in their order

Arguments and results are JSON.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
LIMIT = 1800  # seconds
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "DS_ACCELERATOR": "cpu",
    # What is let go is gone: memory that is held can be told from memory that was.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def run_on_processes(processes: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what a function returns on each of several processes."""
    with tempfile.TemporaryDirectory() as name:
        call = [function.__module__, function.__name__, list(arguments)]
        (Path(name) / "call.json").write_text(json.dumps(call), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        launcher += ["--master-addr", "127.0.0.1"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", __name__, name],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        if done.returncode:
            raise RuntimeError(f"{function.__name__} on {processes} processes: {done.stderr}")
        files = (Path(name) / f"{rank}.json" for rank in range(processes))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _run_call(folder: Path) -> None:
    import torch

    from mm_piece import distributed

    torch.set_num_threads(1)
    distributed.join_process_group()
    module, name, arguments = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    result = getattr(importlib.import_module(module), name)(*arguments)
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(result), encoding="utf-8")
    distributed.barrier()
    distributed.exit_process(0)


if __name__ == "__main__":
    _run_call(Path(sys.argv[1]))
