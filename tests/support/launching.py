"""Starts commands in several processes, as a user's launcher would, on this machine alone."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

SUPPORT = Path(__file__).parent
LIMIT = 500  # seconds for one command, a tenth of it where nothing else runs


def launch(processes, *command):
    """Start a command in as many processes."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    starter += ["--master-addr", "127.0.0.1", "--rdzv-backend", "c10d"]
    starter += ["--rdzv-endpoint", "127.0.0.1:0"]
    return started([*starter, *command])


def started(command, **environment):
    """Start one process of its own session."""
    local = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command,
        env={**os.environ, **local, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def done(process, status=0):
    """What a started command printed."""
    try:
        said, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        if process.poll() is None:  # forks have ended already
            kill(process)
        raise
    said += errors or ""  # None where both went one way
    assert (process.returncode == 0) == (status == 0), said
    return said


def kill(process):
    """`kill -9` for a launcher and all that it has started, sessions of their own included."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in everyone:
        one.kill()
    return process.communicate()[0]
