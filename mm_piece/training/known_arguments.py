"""What becomes of every setting of transformers.TrainingArguments here.

The lists are complete: a test compares them to the class, so that a setting which a later version
brings is looked at before anyone relies on it, and is refused until then.
"""

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

HONOURED = {
    "per_device_train_batch_size": "examples of a process in a batch",
    "per_device_eval_batch_size": "examples of a batch of answers",
    "gradient_accumulation_steps": "batches of a step",
    "num_train_epochs": "how long a task is learned",
    "max_steps": "how long a task is learned, in place of num_train_epochs",
    "learning_rate": "of the optimizer",
    "lr_scheduler_type": "how the rate goes; all but those that need scores on the way",
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
    "bf16": "autocast while values train",
    "fp16": "autocast while values train, gradients scaled; of accelerators",
    "tf32": "of the whole process; of accelerators",
    "use_cpu": "where the model lies",
    "full_determinism": "of the whole process, scores too",
    "data_seed": "the order of the examples",
    "dataloader_drop_last": "whether the last batch may be smaller",
    "dataloader_num_workers": "processes that read examples",
    "dataloader_persistent_workers": "whether they stay from epoch to epoch",
    "dataloader_pin_memory": "how batches reach a device",
    "dataloader_prefetch_factor": "batches read ahead by each worker",
    "activation_checkpointing": "activations are computed again, without use_reentrant",
    "activation_checkpointing_kwargs": "activations are computed again, without use_reentrant",
    "gradient_checkpointing": "another name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "another name of activation_checkpointing_kwargs",
    "torch_empty_cache_steps": "when a device's cache is emptied",
    "save_strategy": "when checkpoints of a task in progress are written; not best",
    "save_steps": "when checkpoints of a task in progress are written",
    "save_total_limit": "how many of them stay",
    "save_on_each_node": "where they are written",
    "logging_strategy": "when loss and rate are noted",
    "logging_steps": "when loss and rate are noted",
    "logging_first_step": "when loss and rate are noted",
    "logging_nan_inf_filter": "of the noted loss",
    "include_num_input_tokens_seen": "what else is noted",
    "disable_tqdm": "whether a bar is shown",
    "log_level": "what transformers says",
    "log_level_replica": "what transformers says",
    "log_on_each_node": "what transformers says",
    "report_to": "further reporters; TensorBoard's files are always written",
    "run_name": "for reporters that read it",
    "project": "for trackio",
    "trackio_space_id": "for trackio",
    "trackio_bucket_id": "for trackio",
    "trackio_static_space_id": "for trackio",
    "ddp_timeout": "how long processes wait for each other",
    "ddp_find_unused_parameters": "of DDP; not needed here",
    "ddp_bucket_cap_mb": "of DDP",
    "ddp_broadcast_buffers": "of DDP",
    "deepspeed": "see `distributed`",
}

HARMLESS = {
    "do_train": "for scripts; `train` trains",
    "use_cache": "of the forward pass of a step, which has no use for one",
    "skip_memory_metrics": "what Trainer counts, nobody reads here",
}

_EVALUATED_ELSEWHERE = "every position is measured on `test` and `general` instead"
_PUSHED_BY_COMMAND = "`mm-piece push` copies a store to the Hub"
_RESUMED_EXACTLY = "a run goes on where it stopped, bit for bit"
_ORDERED = "all processes together learn one random order of the examples"
_DIVIDED = "processes divide the work as DDP does, or by `deepspeed`"
# Each with the reason. The value that is used anyway, mostly the library's default, may be written.
REFUSED = {
    "output_dir": "a run has its `store`",
    "seed": "it is a key beside `train`",
    "remove_unused_columns": "rows are made into model inputs here",
    "label_names": "rows are made into model inputs here",
    "resume_from_checkpoint": _RESUMED_EXACTLY,
    "ignore_data_skip": f"{_RESUMED_EXACTLY}, on the examples that were not learned yet",
    "restore_callback_states_from_checkpoint": f"{_RESUMED_EXACTLY}, and not stopped again",
    "save_only_model": f"{_RESUMED_EXACTLY}, which takes the optimizer's state too",
    "enable_jit_checkpoint": "SIGTERM makes a checkpoint anyway",
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
    "push_to_hub": _PUSHED_BY_COMMAND,
    "hub_token": _PUSHED_BY_COMMAND,
    "hub_private_repo": _PUSHED_BY_COMMAND,
    "hub_model_id": _PUSHED_BY_COMMAND,
    "hub_strategy": _PUSHED_BY_COMMAND,
    "hub_always_push": _PUSHED_BY_COMMAND,
    "hub_revision": _PUSHED_BY_COMMAND,
    "train_sampling_strategy": _ORDERED,
    "length_column_name": _ORDERED,
    "dataloader_in_order": _ORDERED,
    "accelerator_config": _ORDERED,
    "dataloader_multiprocessing_context": "workers start as Python starts processes",
    "auto_find_batch_size": "what a task learns must not depend on free memory",
    "average_tokens_across_devices": "a step's loss is the mean over its tokens on all processes",
    "optim_target_modules": "the values of a mask are trained, no modules",
    "torch_compile": "what is compiled depends on the lengths seen so far; a stopped run differs",
    "torch_compile_backend": "see torch_compile",
    "torch_compile_mode": "see torch_compile",
    "use_liger_kernel": "it changes the model for good, which a run that goes on would not find",
    "liger_kernel_config": "see use_liger_kernel",
    "debug": "what it hangs on the model stays there and watches scores too",
    "parallelism_config": _DIVIDED,
    "fsdp": _DIVIDED,
    "fsdp_config": _DIVIDED,
    "ddp_backend": _DIVIDED,
    "ddp_static_graph": "steps with and without images use different weights",
    "local_rank": "the launcher says it",
}

# Old name -> new name; who writes both must mean the same.
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

FIELDS: dict[str, Field] = {field.name: field for field in fields(TrainingArguments)}


def default_of(key: str) -> Any:
    """What transformers takes where a setting is not written."""
    field = FIELDS[key]
    return field.default if field.default_factory is MISSING else field.default_factory()
