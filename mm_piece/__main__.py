"""`python -m mm_piece`: the same as the `mm-piece` command."""

from mm_piece.cli import main

main()
