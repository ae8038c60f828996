"""Trains one recipe after the other, in whatever processes a launcher has started."""

import sys

import mm_piece
from mm_piece import distributed

if __name__ == "__main__":
    for recipe in sys.argv[1:]:
        mm_piece.train(recipe)
    distributed.exit_process(0)
