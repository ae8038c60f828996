"""Other processes and what lies on them: the only wing that knows DDP and DeepSpeed ZeRO.

collectives        start processes, talk to them, divide work
shards             a weight that lies in parts on several processes (ZeRO-3): read, write, gather it
deepspeed_config   what a DeepSpeed configuration may ask for
deepspeed_engine   DeepSpeed around a model: partitioned loading, passes outside of training, state
progress           one bar and one line for all processes
"""

from mm_piece.distributed.collectives import (
    PATIENCE,
    Share,
    agreed,
    end,
    gathered,
    is_main,
    joined,
    lost,
    rank,
    rounds,
    share,
    size,
    start,
    summed,
    told,
    wait,
)
from mm_piece.distributed.deepspeed_engine import (
    SETTINGS,
    Zero,
    alone,
    divide_decay,
    has_engine,
    laid_out,
    leave,
    load_state,
    release,
    save_state,
    zero_of,
)
from mm_piece.distributed.shards import is_cut, norm_of, put_all, shape_of, take, whole

__all__ = [
    "PATIENCE",
    "SETTINGS",
    "Share",
    "Zero",
    "alone",
    "agreed",
    "divide_decay",
    "end",
    "gathered",
    "has_engine",
    "is_cut",
    "is_main",
    "joined",
    "laid_out",
    "leave",
    "load_state",
    "lost",
    "norm_of",
    "put_all",
    "rank",
    "release",
    "rounds",
    "save_state",
    "shape_of",
    "share",
    "size",
    "start",
    "summed",
    "take",
    "told",
    "wait",
    "whole",
    "zero_of",
]
