"""A function of a bench module in several processes that torchrun starts on this machine.

run_on_processes(processes, function, *arguments)    its results, in the order of the processes

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
    # freed memory goes back to the system at once, so that what is left is in use
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def run_on_processes(processes: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return a function's results on each of several processes."""
    call = [function.__module__, function.__name__, list(arguments)]
    # port 0: torchrun chooses a free one
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--master-addr", "127.0.0.1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call.json").write_text(json.dumps(call), encoding="utf-8")
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

        results = []
        for rank in range(processes):
            file = folder / f"{rank}.json"
            results.append(json.loads(file.read_text(encoding="utf-8")))
        return results


def _run_call(folder: Path) -> None:
    """Call the function in one of the processes, and write its result."""
    import torch

    from mm_piece import distributed

    torch.set_num_threads(1)
    distributed.join_process_group()
    call = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    module_name, name, arguments = call
    module = importlib.import_module(module_name)
    result = getattr(module, name)(*arguments)

    file = folder / f"{distributed.rank()}.json"
    file.write_text(json.dumps(result), encoding="utf-8")
    # no process leaves while another one may still need it
    distributed.barrier()
    distributed.exit_process(0)


if __name__ == "__main__":
    _run_call(Path(sys.argv[1]))
