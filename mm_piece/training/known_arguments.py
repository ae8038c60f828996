"""The settings of transformers' TrainingArguments, and what becomes of each.

The tables are complete: a test compares them to the class. A setting that a later version of
transformers brings is refused until someone has looked at it.
"""

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

HONOURED = {
    # what a step is, and how many there are
    "per_device_train_batch_size": "examples of a process in a batch",
    "per_device_eval_batch_size": "examples of a batch of answers",
    "gradient_accumulation_steps": "batches of a step",
    "num_train_epochs": "how long a task is learned",
    "max_steps": "how long a task is learned, in place of num_train_epochs",
    # how values move
    "learning_rate": "of the optimizer",
    "lr_scheduler_type": "how the learning rate goes; all but those that need scores on the way",
    "lr_scheduler_kwargs": "of the schedule; see `schedules`",
    "warmup_steps": "of the schedule; see `schedules`",
    "optim": "those of `optimizers`",
    "optim_args": "what the optimizer takes of them, also as a mapping; anything else is refused",
    "weight_decay": "of the trained values",
    "adam_beta1": "of Adam; refused with another optimizer",
    "adam_beta2": "of Adam; refused with another optimizer",
    "adam_epsilon": "of Adam; refused with another optimizer",
    "max_grad_norm": "the norm of all trained values' gradients",
    "label_smoothing_factor": "see `loss`",
    "neftune_noise_alpha": "noise on the embeddings while values train",
    # how numbers are computed, and where
    "bf16": "autocast while values train",
    "fp16": "autocast while values train, gradients scaled; of accelerators",
    "tf32": "of the whole process; of accelerators",
    "use_cpu": "where the model lies",
    "full_determinism": "of the whole process, scores too",
    # which examples come when, and how they are loaded
    "data_seed": "the order of the examples",
    "dataloader_drop_last": "whether the last batch may be smaller",
    "dataloader_num_workers": "processes that read examples",
    "dataloader_persistent_workers": "whether they stay from epoch to epoch",
    "dataloader_pin_memory": "how batches reach a device",
    "dataloader_prefetch_factor": "batches read ahead by each worker",
    # memory
    "activation_checkpointing": "activations are recomputed, without use_reentrant",
    "activation_checkpointing_kwargs": "activations are recomputed, without use_reentrant",
    "gradient_checkpointing": "another name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "another name of activation_checkpointing_kwargs",
    "torch_empty_cache_steps": "when a device's cache is emptied",
    # checkpoints, by which a stopped run goes on
    "save_strategy": "when checkpoints of a task in progress are written; not best",
    "save_steps": "when checkpoints of a task in progress are written",
    "save_total_limit": "how many of them stay",
    "save_on_each_node": "where they are written",
    # what is logged, and where
    "logging_strategy": "when loss and learning rate are logged",
    "logging_steps": "when loss and learning rate are logged",
    "logging_first_step": "when loss and learning rate are logged",
    "logging_nan_inf_filter": "of the logged loss",
    "include_num_input_tokens_seen": "what else is logged",
    "disable_tqdm": "whether a bar is shown",
    "log_level": "what transformers says",
    "log_level_replica": "what transformers says",
    "log_on_each_node": "what transformers says",
    "report_to": "further reporters; TensorBoard's files are written where it is installed",
    "run_name": "for reporters that read it",
    "project": "for trackio",
    "trackio_space_id": "for trackio",
    "trackio_bucket_id": "for trackio",
    "trackio_static_space_id": "for trackio",
    # several processes
    "ddp_timeout": "how long processes wait for each other",
    "ddp_find_unused_parameters": "of DDP; not needed here",
    "ddp_bucket_cap_mb": "of DDP",
    "ddp_broadcast_buffers": "of DDP",
    "deepspeed": "see `distributed`",
}

HARMLESS = {
    "do_train": "for scripts; `train` trains",
    "use_cache": "of the forward pass of a step, which has no use for one",
    "skip_memory_metrics": "what Trainer counts is not read here",
}

_EVALUATED_ELSEWHERE = "every position is measured on `test` and `general` instead"
_PUSHED_BY_COMMAND = "`mm-piece push` copies a store to the Hub"
_RESUMED_EXACTLY = "a run goes on where it stopped, bit for bit"
_ORDERED = "all processes together learn one random order of the examples"
_DIVIDED = "processes divide the work as DDP does, or by `deepspeed`"
# Each with the reason. A recipe may still write the value that is used anyway, mostly the default.
REFUSED = {
    # a recipe says it elsewhere
    "output_dir": "a run has its `store`",
    "seed": "it is a key beside `train`",
    "remove_unused_columns": "rows are made into model inputs here",
    "label_names": "rows are made into model inputs here",
    # a run always goes on by itself
    "resume_from_checkpoint": _RESUMED_EXACTLY,
    "ignore_data_skip": f"{_RESUMED_EXACTLY}, on the examples that were not learned yet",
    "restore_callback_states_from_checkpoint": f"{_RESUMED_EXACTLY}, and not stopped again",
    "save_only_model": f"{_RESUMED_EXACTLY}, which takes the optimizer's state too",
    "enable_jit_checkpoint": "SIGTERM makes a checkpoint anyway",
    # scores come from `evaluation`, at the ends of tasks
    "load_best_model_at_end": _EVALUATED_ELSEWHERE,
    "metric_for_best_model": _EVALUATED_ELSEWHERE,
    "greater_is_better": _EVALUATED_ELSEWHERE,
    "do_eval": _EVALUATED_ELSEWHERE,
    "do_predict": _EVALUATED_ELSEWHERE,
    "eval_strategy": _EVALUATED_ELSEWHERE,
    "eval_steps": _EVALUATED_ELSEWHERE,
    "eval_delay": _EVALUATED_ELSEWHERE,
    "eval_on_start": _EVALUATED_ELSEWHERE,
    "eval_accumulation_steps": _EVALUATED_ELSEWHERE,
    "eval_do_concat_batches": _EVALUATED_ELSEWHERE,
    "eval_use_gather_object": _EVALUATED_ELSEWHERE,
    "prediction_loss_only": _EVALUATED_ELSEWHERE,
    "include_for_metrics": _EVALUATED_ELSEWHERE,
    "batch_eval_metrics": _EVALUATED_ELSEWHERE,
    "bf16_full_eval": f"{_EVALUATED_ELSEWHERE}, in the dtype of `model`",
    "fp16_full_eval": f"{_EVALUATED_ELSEWHERE}, in the dtype of `model`",
    # sharing is a command of its own
    "push_to_hub": _PUSHED_BY_COMMAND,
    "hub_token": _PUSHED_BY_COMMAND,
    "hub_private_repo": _PUSHED_BY_COMMAND,
    "hub_model_id": _PUSHED_BY_COMMAND,
    "hub_strategy": _PUSHED_BY_COMMAND,
    "hub_always_push": _PUSHED_BY_COMMAND,
    "hub_revision": _PUSHED_BY_COMMAND,
    # one order of the examples for any number of processes
    "train_sampling_strategy": _ORDERED,
    "length_column_name": _ORDERED,
    "dataloader_in_order": _ORDERED,
    "accelerator_config": _ORDERED,
    "dataloader_multiprocessing_context": "workers start as Python starts processes",
    "auto_find_batch_size": "what a task learns must not depend on free memory",
    "average_tokens_across_devices": "a step's loss is the mean over its tokens on all processes",
    "optim_target_modules": "the values of a mask are trained, no modules",
    # a changed model or backward pass
    "torch_compile": "what is compiled depends on the lengths seen so far; a stopped run differs",
    "torch_compile_backend": "see torch_compile",
    "torch_compile_mode": "see torch_compile",
    "use_liger_kernel": "it changes the model for good, which a run that goes on would not find",
    "liger_kernel_config": "see use_liger_kernel",
    "debug": "what it hangs on the model stays there and watches scores too",
    # other ways to divide a model
    "parallelism_config": _DIVIDED,
    "fsdp": _DIVIDED,
    "fsdp_config": _DIVIDED,
    "ddp_backend": _DIVIDED,
    "ddp_static_graph": "steps with and without images use different weights",
    "local_rank": "the launcher says it",
}

# Old name -> new name; a recipe that has both must give both the same value.
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

FIELDS: dict[str, Field] = {field.name: field for field in fields(TrainingArguments)}


def default_of(key: str) -> Any:
    """Return the value that transformers takes where a recipe has no such setting."""
    field = FIELDS[key]
    if field.default_factory is MISSING:
        return field.default
    return field.default_factory()
