"""Checkpoints of a task in progress, and the settings handed to transformers."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments

from mm_piece.data import IGNORE_INDEX, EncodedList, encode, read
from mm_piece.distributed import zero_config
from mm_piece.errors import RecipeError
from mm_piece.models.base import load_base
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.training.arguments import arguments
from mm_piece.training.batches import DistributedBatchSampler, PaddedDataset
from mm_piece.training.trainer import find_last_checkpoint, fit


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    assert find_last_checkpoint(tmp_path / "absent") is None
    for step, state in ((2, json.dumps({})), (10, json.dumps({})), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_settings_go_through_as_they_stand(tmp_path):
    args = arguments({"learning_rate": 3e-4, "max_steps": 7}, tmp_path, seed=5)
    assert (args.learning_rate, args.max_steps, args.seed) == (3e-4, 7, 5)


@pytest.mark.parametrize("settings", [{"learning_rte": 1e-4}, {"lr_scheduler_type": "sideways"}])
def test_settings_that_transformers_refuses(tmp_path, settings):
    with pytest.raises(RecipeError, match="train: .*(learning_rte|sideways)"):
        arguments(settings, tmp_path, seed=1)


CHECKPOINTING_KEYS = [
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",  # newer versions of transformers have both
]


@pytest.mark.parametrize("key", CHECKPOINTING_KEYS)
def test_checkpointing_that_would_leave_a_tower_untrained_is_refused(tmp_path, key):
    if key not in TrainingArguments.__dataclass_fields__:
        pytest.skip(f"this transformers has no {key}")
    with pytest.raises(RecipeError, match="train: use_reentrant must be false"):
        arguments({"gradient_checkpointing": True, key: {"use_reentrant": True}}, tmp_path, seed=1)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_stops_below_the_lowest_entry(base, tmp_path, checkpointing):
    model, processor = load_base(base)
    examples = [encode(example, processor) for example in read("scenes:digits/train[:4]")]
    settings = {"max_steps": 2, "gradient_checkpointing": checkpointing, "disable_tqdm": True}
    asks = []
    lowest = model.get_decoder().layers[0]
    lowest.register_forward_hook(lambda *given: asks.append(given[2].requires_grad))
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    with sparse_tuning(model, {name: torch.arange(5)}) as tuning:
        fit(tuning, EncodedList(examples, 0), arguments(settings, tmp_path, 0), tmp_path / "logs")
        assert tuning.patches[name].count_changed() == 5
    assert asks == [False] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ddp_timeout": "abc"},
            "ddp_timeout must be a whole number above 0 and at most .*, not 'abc'",
        ),
        ({"ddp_timeout": 0}, "ddp_timeout must be a whole number above 0 and at most .*, not 0"),
        ({"use_cpu": "maybe"}, "use_cpu must be true or false, not 'maybe'"),
        ({"save_steps": 0}, "save_steps must be a number above 0, not 0"),
        ({"max_grad_norm": -1}, "max_grad_norm must be a number of at least 0 .*"),
        ({"per_device_train_batch_size": 0}, "a whole number of at least 1, not 0"),
        ({"warmup_steps": True}, "warmup_steps must be a number of at least 0, .*, not True"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=f"^train: {message}|{message}$"):
        arguments(settings, tmp_path, seed=1)


FILLED = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)


def of_stage(stage, **more):
    return {"deepspeed": {**FILLED, "zero_optimization": {"stage": stage, **more}}}


def with_section(**sections):
    return {"deepspeed": {**of_stage(2)["deepspeed"], **sections}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"deepspeed": "absent.json"}, "cannot read absent.json"),
        ({"deepspeed": {}}, "zero_optimization.stage must be 1, 2 or 3"),
        (of_stage(4), "stage must be 1, 2 or 3"),
        (of_stage(True), "stage must be 1, 2 or 3"),
        ({"bf16": True, **of_stage(2)}, "bf16 under DeepSpeed"),
        (with_section(fp16={"enabled": True}), "fp16 under DeepSpeed"),
        (with_section(bf16=True), "bf16 must be a section"),
        (
            {"lr_scheduler_type": "cosine", **with_section(scheduler={"type": "WarmupLR"})},
            "lr_scheduler_type and the configuration's scheduler exclude each other",
        ),
        (
            {"lr_scheduler_kwargs": {"a": 1}, **with_section(scheduler={"type": "WarmupLR"})},
            "lr_scheduler_kwargs and the configuration's scheduler exclude each other",
        ),
        ({"ddp_bucket_cap_mb": 1, **of_stage(2)}, "ddp_bucket_cap_mb is of DDP, which is not used"),
        (with_section(optimizer=5), "optimizer must be a section"),
        (with_section(optimizer={"type": "Nope"}), "optimizer.type 'nope' is none of .*adamw"),
        (with_section(scheduler={"type": "Nope"}), "scheduler.type 'Nope' is none of .*WarmupLR"),
        (
            {
                "optim": "sgd",
                **with_section(optimizer={"type": "AdamW", "params": {"torch_adam": True}}),
            },
            "optim and the configuration's optimizer exclude each other",
        ),
        (of_stage(3, offload_param={"device": "nvme"}), "must be cpu or none, not nvme"),
        (of_stage(1, offload_optimizer={"device": "nvme"}), "must be cpu or none, not nvme"),
        (of_stage(3, offload_param={"device": "disk"}), "zero_optimization.offload_param.device: "),
        (of_stage(3, offload_param="cpu"), "zero_optimization.offload_param: "),
        (of_stage(1, foo=1), "zero_optimization.foo: Extra inputs are not permitted$"),
        (of_stage(3, zero_hpz_partition_size=2), "zero_hpz_partition_size must be 1"),
        (of_stage(3, zero_hpz_partition_size="two"), "zero_optimization.zero_hpz_partition_size: "),
        (of_stage(3, zero_quantized_weights=True), "zero_quantized_weights would change"),
        *(
            (
                {
                    "deepspeed": {
                        key: value
                        for key, value in with_section()["deepspeed"].items()
                        if key != name
                    }
                },
                f"{name} must be there",
            )
            for name in FILLED
        ),
    ],
)
def test_divisions_that_cannot_be(train, message):
    pytest.importorskip("deepspeed")
    with pytest.raises(RecipeError, match=message):
        zero_config(train, "float32")


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without one")
def test_no_optimizer_is_compiled_on_a_cpu():
    pytest.importorskip("deepspeed")
    with pytest.raises(RecipeError, match="torch_adam must be true on a CPU"):
        zero_config(with_section(optimizer={"type": "AdamW"}), "float32")


@pytest.mark.slow
def test_a_plan_alone_patches_nothing(monkeypatch):
    linear = pytest.importorskip("deepspeed.runtime.zero.linear")
    own = staticmethod(lambda *_: None)
    monkeypatch.setattr(linear.LinearFunctionForZeroStage3, "forward", own)
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    zero = zero_config({"deepspeed": {**FILLED, "zero_optimization": {"stage": 2}}}, "float32")
    assert linear.LinearFunctionForZeroStage3.forward is own.__func__
    assert not torch._dynamo.config.disable
    zero.loading_context()
    assert linear.LinearFunctionForZeroStage3.forward is not own.__func__


@pytest.mark.slow
def test_deepspeed_comes_with_a_launcher(monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.delenv("RANK", raising=False)
    zero = zero_config({"deepspeed": {**FILLED, "zero_optimization": {"stage": 1}}}, "float32")
    with pytest.raises(RecipeError, match="needs a launcher that starts processes: torchrun"):
        zero.require_launcher()
    zero_config({}, "float32").require_launcher()


def test_an_order_of_examples_is_dealt_out(monkeypatch):
    """Every example once an epoch, blanks at the end, the order of one process."""
    alone = [n for batch in DistributedBatchSampler(11, 4, seed=5, drop_last=False) for n in batch]
    assert sorted(alone) == list(range(11))
    monkeypatch.setenv("WORLD_SIZE", "2")
    feeds = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        feeds.append(list(DistributedBatchSampler(11, 2, seed=5, drop_last=False)))
    dealt = [n for pair in zip(*feeds, strict=True) for batch in pair for n in batch]
    assert dealt == [*alone, 11]
    kept = DistributedBatchSampler(11, 2, seed=5, drop_last=True)
    assert len(kept) == len(list(kept)) == 2
    kept.set_epoch(1)
    assert list(kept) != list(DistributedBatchSampler(11, 2, seed=5, drop_last=True))


def test_a_batch_without_a_picture_gets_a_blank(monkeypatch):
    ids = torch.tensor([[5, 6, 7]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    picture = {**text, "pixel_values": torch.rand(1, 3, 4, 4)}
    company = PaddedDataset(EncodedList([text, picture, text], 0))
    assert len(company.collate([text, text])["labels"]) == 2  # one process needs none
    monkeypatch.setenv("WORLD_SIZE", "2")
    batch = company.collate([text, text])
    assert batch["labels"].tolist() == [[5, 6, 7], [5, 6, 7], [IGNORE_INDEX] * 3]
    assert torch.equal(batch["pixel_values"], picture["pixel_values"])
    assert len(company.collate([text, picture])["labels"]) == 2
    assert (company[3]["labels"] == IGNORE_INDEX).all() and "pixel_values" in company[3]
    assert len(PaddedDataset(EncodedList([text, text], 0)).collate([text])["labels"]) == 1


# What `pip install mm-piece` does not bring; None in sys.modules is to Python what is not there.
EXTRAS = (
    "deepspeed lm_eval lmms_eval open_clip timm peft trl pycocoevalcap hypothesis psutil "
    "matplotlib sacrebleu scipy sklearn tensorboard"
)
BARE = """
import sys

sys.modules |= dict.fromkeys(sys.argv[2].split())
import mm_piece

store = mm_piece.train(sys.argv[1])
print(mm_piece.position(mm_piece.load(store=store, at=1)[0]))
"""


@pytest.mark.slow
def test_a_run_needs_no_extra(base, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    rows = "train: 'scenes:digits/train[:4]', test: 'scenes:digits/test[:1]'"
    recipe.write_text(
        f"{{base: {base}, store: {tmp_path / 'store'}, tasks: [{{name: digits, {rows}}}], "
        "select: {density: 0.01}, train: {max_steps: 1, disable_tqdm: true}}"
    )
    command = [sys.executable, "-c", BARE, str(recipe), EXTRAS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1"
