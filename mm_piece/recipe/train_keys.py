"""Names of training settings, for messages that need no transformers.

`train` and a task's `train_settings` go to transformers' TrainingArguments, which knows what is
right; `mm_piece.training.known_arguments` has what becomes of every setting.
"""

# What a task may set for itself, under `train_settings`.
TASK_KEYS = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "data_seed",
    "dataloader_drop_last",
    "save_steps",
    "logging_steps",
}
# The commonest of those that a whole run has, under `train`: where its model lies, how numbers are
# computed, which processes share the work.
RUN_KEYS = {
    "bf16",
    "fp16",
    "tf32",
    "use_cpu",
    "full_determinism",
    "gradient_checkpointing",
    "activation_checkpointing",
    "dataloader_num_workers",
    "per_device_eval_batch_size",
    "save_strategy",
    "save_total_limit",
    "logging_strategy",
    "disable_tqdm",
    "report_to",
    "run_name",
    "ddp_timeout",
    "deepspeed",
}
