"""Every engine that a run may use, and recipes that ask for it."""

import json
from pathlib import Path

from made_up_rows import COLOURS, data_of

# A model as small as these is gathered once and for all with DeepSpeed's own thresholds.
NEVER_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}

WITH_IMAGES = (0, 6)  # of eleven rows, four a step
CPU = {"device": "cpu", "pin_memory": False}
ENGINES = {
    "ddp": None,
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": {"stage": 3, **NEVER_KEPT},
    "zero3-kept": {"stage": 3},
    "zero3-offload": {"stage": 3, **NEVER_KEPT, "offload_optimizer": CPU, "offload_param": CPU},
}


def config_of(section, optimizer=True):
    """A DeepSpeed configuration as `pipelines/deepspeed` has them."""
    file = Path(__file__).parents[2] / "pipelines" / "deepspeed" / "zero1.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"zero_optimization": section}
    config["zero_force_ds_cpu_optimizer"] = False
    return config if optimizer else {k: v for k, v in config.items() if k != "optimizer"}


def recipe_writer(tmp_path):
    """A function that writes a recipe for an engine, and the data it reads."""
    rows = []
    for n in range(11):
        turns = [f"{n} + 1?", "many " * (n % 4) + str(n + 1)]
        row = {}
        if n in WITH_IMAGES:
            (tmp_path / f"{n}.png").write_bytes(data_of(list(COLOURS)[n % len(COLOURS)]))
            row, turns = {"image": f"{n}.png"}, [f"<image>\n{turns[0]}", turns[1]]
        speakers = zip(("human", "gpt"), turns, strict=True)
        rows.append({**row, "conversations": [{"from": w, "value": t} for w, t in speakers]})
    data = str(tmp_path / "rows.json")
    Path(data).write_text(json.dumps(rows), encoding="utf-8")

    def _write(
        base, engine, processes, section=None, dtype="float32", method="piece-s", keep=(), **train
    ):
        content = {
            **dict(keep),
            "base": str(base),
            "store": str(tmp_path / engine),
            "tasks": [
                {"name": "seen", "train": f"{data}[:7]", "test": f"{data}[:2]"},
                {"name": "mixed", "train": data, "test": f"{data}[:3]"},
            ],
            "model": {"dtype": dtype},
            "select": {
                "method": method,
                "density": {"vision": 0.03, "projector": 0.03, "language": 0.02},
                "cache": str(tmp_path / f"m-{engine}"),
            },
            "train": {
                "learning_rate": 1e-2,
                "num_train_epochs": 2,
                "weight_decay": 0.1,
                "per_device_train_batch_size": 4 // processes,
                **train,
            },
        }
        content["tasks"] = [
            {**t, "images": str(tmp_path), "max_new_tokens": 2} for t in content["tasks"]
        ]
        if section is not None:
            content["train"]["deepspeed"] = config_of(section)
        recipe = tmp_path / f"{engine}.yaml"
        recipe.write_text(json.dumps(content), encoding="utf-8")
        return recipe

    return _write
