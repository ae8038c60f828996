"""Sequential full fine-tuning: every weight trains on every task in turn."""

from peers.peer import Peer as Full

__all__ = ["Full"]
