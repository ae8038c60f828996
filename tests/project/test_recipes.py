"""The shipped recipes: valid, as published, and true to what their headers and the README say."""

import json
import re
from inspect import signature
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from mm_piece.data import read
from mm_piece.families import group_of
from mm_piece.recipe import MetricName, load_recipe
from mm_piece.training.arguments import arguments

PIPELINES = Path(__file__).parents[2] / "pipelines"
README = (PIPELINES / "README.md").read_text(encoding="utf-8")
FILES = {file.stem: file for file in sorted(PIPELINES.glob("*.yaml"))}
TEXTS = {name: file.read_text(encoding="utf-8") for name, file in FILES.items()}
RECIPES = {name: load_recipe(file) for name, file in FILES.items()}
DEEPSPEED = sorted((PIPELINES / "deepspeed").glob("*.json"))

LLAVA = "llava-hf/llava-1.5-7b-hf"
PIECE = "action commonsense count"
VQACL = "recognition location judge commonsense count action color type subcategory causal"
TRACE = "C-STANCE FOMC MeetingBank ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten Py150"
# Base, order of the tasks, epochs, examples an update.
PUBLISHED = {
    "piece-vlm-llava": (LLAVA, PIECE, 5, 128),
    "piece-vlm-qwen3-vl": ("Qwen/Qwen3-VL-4B-Instruct", PIECE, 5, 128),
    "vqacl": (LLAVA, VQACL, 5, 128),
    "coin": (LLAVA, "ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCR-VQA", 1, 112),
    "ucit": (LLAVA, "ImageNet-R ArxivQA VizWiz IconQA CLEVR-Math Flickr30k", 1, 96),
    "mllm-dcl": (LLAVA, "RS Med AD Sci Fin", 1, 64),
    "trace": ("meta-llama/Meta-Llama-3-8B", TRACE, 5, 64),
    "trace-three": ("meta-llama/Meta-Llama-3-8B", "ScienceQA FOMC MeetingBank", 5, 64),
    "cross-domain": (LLAVA, "Py150 action ScienceQA", 5, 128),
}
# What the published bases are made of; the rest is transformers' default for their kind.
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_3_8B = {"vocab_size": 128256, "intermediate_size": 14336, **HEADS}
QWEN3_VL_TEXT = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, **HEADS}
QWEN3_VL_TEXT |= {"num_hidden_layers": 36, "head_dim": 128}
QWEN3_VL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
QWEN3_VL_TOWER |= {"out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]}
QWEN3_VL = {"text_config": QWEN3_VL_TEXT, "vision_config": QWEN3_VL_TOWER}
BASES = {
    "piece-vlm-llava": ("llava", {"text_config": {"vocab_size": 32064}}),
    "piece-vlm-qwen3-vl": ("qwen3_vl", {**QWEN3_VL, "tie_word_embeddings": True}),
    "trace": ("llama", LLAMA_3_8B),
    "trace-three": ("llama", LLAMA_3_8B),
}


def header(name):
    """The comment a recipe opens with, without its hashes."""
    opening = takewhile(lambda line: line.startswith("#"), TEXTS[name].splitlines())
    return [line[1:].strip() for line in opening]


def sources(recipe):
    """Every place that a recipe reads from or writes to."""
    for task in (*recipe.tasks, *recipe.general):
        yield from (task.test, task.images or "", getattr(task, "train", ""))
    yield from (recipe.store, recipe.base)


def test_nothing_is_missing():
    tiny = {"tiny", "tiny-published", "tiny-domains", "tiny-pictures", "tiny-texts", "photos"}
    assert {*PUBLISHED, "own-data", *tiny} == set(FILES)
    stages = {"zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"}
    assert {file.stem for file in DEEPSPEED} == stages


@pytest.mark.parametrize("name", FILES)
def test_headers_say_what_how_and_what_to_expect(name):
    lines = header(name)
    assert 5 <= len(lines) <= 15
    assert lines[0] and not lines[1], "a title, then an empty line"
    assert f"Run:    mm-piece train pipelines/{name}.yaml" in lines
    for word in ("Needs:", "Expect:"):
        assert [line for line in lines if line.startswith(word) and len(line) > 20]


@pytest.mark.parametrize("name", FILES)
def test_nothing_points_to_one_machine(name):
    assert not re.search(r"""(^|[\s"'({:=])(/\w|~|[A-Za-z]:\\)""", TEXTS[name], re.M)
    for source in sources(RECIPES[name]):
        assert not source.startswith(("/", "~", "..")), source


@pytest.mark.parametrize("name", FILES)
def test_settings_of_training_are_trainers_own(name, tmp_path):
    recipe = RECIPES[name]
    args = arguments(recipe.train, tmp_path, recipe.seed)
    for key, value in recipe.train.items():
        assert getattr(args, key) == value


@pytest.mark.parametrize("name", PUBLISHED)
def test_order_and_settings_are_the_published_ones(name, tmp_path):
    base, order, epochs, batch = PUBLISHED[name]
    recipe = RECIPES[name]
    args = arguments(recipe.train, tmp_path, recipe.seed)
    assert recipe.base == base
    assert [task.name for task in recipe.tasks] == order.split()
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == batch
    assert (args.num_train_epochs, args.learning_rate, args.seed) == (epochs, 1e-5, 42)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95)
    assert (args.weight_decay, args.max_grad_norm, args.lr_scheduler_type) == (0, 1, "constant")
    assert (recipe.select.density, recipe.select.samples) == (0.001, 1000)
    assert recipe.model["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", PUBLISHED)
def test_tasks_are_different_data(name):
    tasks = RECIPES[name].tasks
    read_from = [source for task in tasks for source in (task.train, task.test)]
    assert len(set(read_from)) == 2 * len(tasks)


@pytest.mark.parametrize("name", BASES)
def test_the_header_counts_the_entries_that_are_selected(name):
    kind, parts = BASES[name]
    select, config = RECIPES[name].select, AutoConfig.for_model(kind, **parts)
    family = AutoModelForCausalLM if kind == "llama" else AutoModelForImageTextToText
    with torch.device("meta"):
        named = family.from_config(config).named_parameters()
    sizes = [weight.numel() for key, weight in named if group_of(key) not in select.exclude]
    stated = re.search(r"([\d,]+) entries a task", " ".join(header(name)))
    assert stated and stated[1] == f"{sum(sizes) // 1000:,}"  # density 0.001


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_recipe_names_its_deepspeed_file(name):
    (named,) = re.findall(r"^  # deepspeed: pipelines/(\S+)", TEXTS[name], re.M)
    assert PIPELINES / named in DEEPSPEED
    assert "deepspeed" not in RECIPES[name].train  # as it stands, it runs in one process


class Filled(HfDeepSpeedConfig):
    """transformers' treatment of a DeepSpeed file, which it only defines where DeepSpeed is."""

    mismatches: list[str] = []
    is_auto = HfTrainerDeepSpeedConfig.is_auto
    fill_match = HfTrainerDeepSpeedConfig.fill_match
    fill_only = HfTrainerDeepSpeedConfig.fill_only
    process = HfTrainerDeepSpeedConfig.trainer_config_process
    finalize = HfTrainerDeepSpeedConfig.trainer_config_finalize


@pytest.mark.parametrize("file", DEEPSPEED, ids=lambda f: f.stem)
def test_transformers_fills_in_each_deepspeed_file(file, tmp_path):
    recipe = RECIPES["trace"]
    args, filled = arguments(recipe.train, tmp_path, recipe.seed), Filled(str(file))
    model = SimpleNamespace(config=AutoConfig.for_model("llama", **LLAMA_3_8B))
    filled.process(args)
    filled.finalize(args, model, 100)
    config = filled.config
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 64 and config["gradient_clipping"] == 1.0
    assert config["optimizer"]["type"] == "AdamW"
    wanted = {"lr": 1e-5, "betas": [0.9, 0.95], "torch_adam": True}
    assert wanted.items() <= config["optimizer"]["params"].items()
    assert config["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("file", DEEPSPEED, ids=lambda f: f.stem)
def test_each_deepspeed_file_is_what_it_is_called(file):
    config = json.loads(file.read_text(encoding="utf-8"))
    stage, _, offload = file.stem.removeprefix("zero").partition("-")
    zero = config["zero_optimization"]
    assert HfDeepSpeedConfig(str(file)).is_zero3() == (stage == "3")
    assert zero["stage"] == int(stage)
    assert ("offload_optimizer" in zero) == bool(offload)
    assert ("offload_param" in zero) == (bool(offload) and stage == "3")
    # It would cast the fp32 values that train; in stage 3 it saves the weights from becoming fp32.
    assert ("bf16" in config) == (stage == "3")
    assert "fp16" not in config


@pytest.mark.parametrize("name", FILES)
def test_the_readme_says_where_data_comes_from(name):
    assert f"`{name}.yaml`" in README.replace("piece-vlm-*.yaml", "")
    if name in ("own-data", "tiny"):
        return
    for source in sources(RECIPES[name]):
        if source.startswith("data/"):
            assert "/".join(source.split("/")[:2]) in README, source
        if source.startswith("hf:"):
            assert re.fullmatch(r"hf:[\w-]+/[\w.-]+(:[\w.-]+)?(@\w+)?/\w+(\[\d*:\d*\])?", source)
            assert re.match(r"hf:[^/]+/[\w.-]+", source)[0] in README, source


def test_the_recipe_to_copy_explains_itself():
    text = TEXTS["own-data"]
    assert "mm-piece check pipelines/own-data.yaml" in text
    for metric in get_args(MetricName):
        assert re.search(rf"#.*\b{metric}\b", text), metric
    for key in ("vision: ", "projector: ", "language: "):
        assert re.search(rf"#.*density: .*{key}", text), key
    assert RECIPES["own-data"].general


def run_readme(section):
    """Run the Python blocks of one of the README's sections, one after another."""
    text = README.split(f"\n## {section}")[1].split("\n## ")[0]
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, str(PIPELINES / "README.md"), "exec"), {})  # noqa: S102


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


def test_questions_of_both_origins_become_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "COCO_val2014_000000000042"
    picture(tmp_path / "data/coco2014/val2014" / f"{name}.jpg")
    row = {"prompt": "Who?", "answer": "me", "pic_path": f"/a/b c/val2014/{name}.jpg"}
    write(tmp_path / "data/vqacl/action/test.json", [row])
    label = {"yes": 1, "zebra": 0.3}
    said = [{"answer": "yes", "answer_id": 1}, {"answer": "no", "answer_id": 2}]
    agreed = {"img_id": name, "sent": "Why?", "label": label, "answers": said}
    write(tmp_path / "Partition_Q/karpathy_test_q_causal.json", [agreed, {**agreed, "label": {}}])
    run_readme("VQA v2")
    (sample,) = read("data/vqacl/action/test.json", "data/coco2014")
    (whole,) = read("data/vqacl/causal/test.json", "data/coco2014")
    assert (sample.prompt, sample.answer) == ("Who?", "me")
    assert (whole.prompt, whole.answer, whole.accepted) == ("Why?", "yes", ["yes", "no"])
    assert len(sample.images) == len(whole.images) == 1


def test_captions_get_their_references(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question_id": n, "image": f"Flickr30k/val/{n}.jpg", "text": "Say."} for n in "ab"]
    notes = [(2, "b one"), (1, "a one"), (2, "b two")]
    for task in ("VizWiz", "Flickr30k"):
        folder = tmp_path / "data/ucit" / task
        write(folder / "test_3000.json", rows)
        captions = [{"image_id": image, "caption": text} for image, text in notes]
        write(folder / "val_coco_type_3000.json", {"annotations": captions})
    for row in rows:
        picture(tmp_path / "data/ucit/datasets" / row["image"])
    run_readme("UCIT")
    task = RECIPES["ucit"].tasks[-1]
    first, second = read(task.test, task.images)
    assert (first.answer, first.accepted) == ("a one", ["a one"])
    assert (second.answer, second.accepted) == ("b one", ["b one", "b two"])


def test_prompts_that_were_trained_on_leave_the_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(RECIPES["trace"].tasks[0].train).parent.parent
    for task in ("NumGLUE-ds", "FOMC"):
        write(folder / task / "train.json", [{"prompt": "one", "answer": "1"}])
        rows = [{"prompt": text, "answer": "2"} for text in ("one", "two")]
        write(folder / task / "test.json", rows)
    run_readme("TRACE")
    (left,) = read(str(folder / "FOMC" / "test_fresh.json"))
    assert left.prompt == "two"


needs_columns = pytest.mark.skipif(
    "columns" not in signature(read).parameters, reason="rows are not renamed yet"
)


@needs_columns
@pytest.mark.parametrize("name", ["coin", "ucit", "mllm-dcl"])
def test_both_formats_of_the_benchmarks_are_read(name, tmp_path):
    said = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "me"}]
    asked = {"question_id": "1", "image": "x.png", "text": "Who?"}
    picture(tmp_path / "x.png")
    for task in filter(lambda task: task.columns, RECIPES[name].tasks):
        write(tmp_path / "train.json", [{"image": "x.png", "conversations": said}])
        write(tmp_path / "test.json", [{**asked, task.columns.get("answer", "answer"): "me"}])
        for split in ("train.json", "test.json"):
            (example,) = read(str(tmp_path / split), None, task.columns, task.prompt)
            assert (example.prompt, example.answer) == ("Who?", "me")


@needs_columns
def test_captions_of_the_hub_are_read(tmp_path):
    row = {"image": "x.png", "caption": ["one", "two"], "filename": "x"}
    picture(tmp_path / "x.png")
    write(tmp_path / "test.json", [row])
    (task,) = RECIPES["coin"].general
    (example,) = read(str(tmp_path / "test.json"), None, task.columns, task.prompt)
    assert (example.prompt, example.accepted) == (task.prompt, ["one", "two"])


def test_the_first_recipe_is_the_published_one_with_the_penalty():
    tiny, published = RECIPES["tiny"], RECIPES["tiny-published"]
    changes = {"store": tiny.store, "penalty": tiny.penalty, "train": tiny.train}
    assert published.model_copy(update=changes) == tiny
    assert tiny.penalty > 0 == published.penalty
    differing = {key for key in tiny.train if tiny.train[key] != published.train.get(key)}
    assert differing == {"learning_rate"}
