"""Deltas: what a task changed, as indices and new values, and the files that hold it.

codec          integers and bit patterns to compact bytes and back
header         the header of a delta file, and what it may hold
rows           what indices and values may be
file           a header and entries to bytes and back
arrays         `DeltaArrays`: a delta without torch
entry_sets     composed, shared and conflicting entries
comparison     what sets of changes have in common
tensor_rows    rows as torch tensors
delta          `Delta`: save, load, apply, undo
merging        several deltas as one
file_layout    weights that checkpoint files hold transposed
interchange/   the formats of other programs
"""
