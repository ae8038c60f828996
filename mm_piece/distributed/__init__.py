"""Other processes, and the parameters on them: the only wing that uses DDP and DeepSpeed ZeRO.

collectives           join the processes of a launcher, communicate, divide work
shards                a weight that ZeRO-3 partitions over the processes: read, write, gather it
deepspeed_config      what a DeepSpeed configuration may ask for
deepspeed_engine      DeepSpeed around a model: partitioned loading, passes beside training, state
deepspeed_protocols   the parts of DeepSpeed's engine that are used
progress              one bar and one line for all processes
"""

from mm_piece.distributed.collectives import (
    DEFAULT_TIMEOUT,
    EntryRange,
    all_gather,
    all_gather_items,
    all_reduce_sum,
    any_rank,
    assign_entry_range,
    barrier,
    broadcast,
    exit_process,
    is_main,
    join_process_group,
    rank,
    schedule_items,
    translate_errors,
    world_size,
)
from mm_piece.distributed.deepspeed_engine import (
    PROCESS_SETTINGS,
    ZeroConfig,
    destroy_engine,
    divide_decay,
    has_engine,
    load_state,
    repartition,
    save_state,
    to_optimizer_layout,
    without_deepspeed,
    zero_config,
)
from mm_piece.distributed.shards import (
    gather_entries,
    gathered_parameters,
    is_partitioned,
    norm_of,
    scatter_entries,
    shape_of,
)

__all__ = [
    "DEFAULT_TIMEOUT",
    "PROCESS_SETTINGS",
    "EntryRange",
    "ZeroConfig",
    "without_deepspeed",
    "any_rank",
    "divide_decay",
    "exit_process",
    "all_gather_items",
    "has_engine",
    "is_partitioned",
    "is_main",
    "all_gather",
    "to_optimizer_layout",
    "destroy_engine",
    "load_state",
    "translate_errors",
    "norm_of",
    "scatter_entries",
    "rank",
    "repartition",
    "schedule_items",
    "save_state",
    "shape_of",
    "assign_entry_range",
    "world_size",
    "join_process_group",
    "all_reduce_sum",
    "gather_entries",
    "broadcast",
    "barrier",
    "gathered_parameters",
    "zero_config",
]
