"""How OpenMP's threads wait for each other, which is settled when torch is first imported."""

import os
import sys

# Each of them says how threads wait; where one is set, its owner has decided.
_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def prefer_passive_waiting() -> None:
    """Have waiting threads sleep, unless the environment says how they wait.

    By default they spin. Beside another busy process each of them then burns the time that the
    thread they wait for would need. Does nothing once torch is imported: its OpenMP has read
    the environment by then.
    """
    is_chosen = any(name in os.environ for name in _WAITING_VARIABLES)
    if is_chosen or "torch" in sys.modules:
        return

    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
