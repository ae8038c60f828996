"""Every keyword of `from_pretrained` under `model:`: it acts, is refused, or changes nothing."""

import inspect
import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import mm_piece
from mm_piece.errors import ModelError, RecipeError, StoreError
from mm_piece.models.base import load_base
from mm_piece.recipe import parse_recipe
from mm_piece.recipe.base_options import ALIASES, HARMLESS, HONOURED, REFUSED
from mm_piece.training.recipe_check import check

# Of reading configurations alone: `return_unused_kwargs` and the like, or of other classes.
ASIDE = {
    *("self", "cls", "args", "kwargs", "model_args", "pretrained_model_name_or_path"),
    *("return_unused_kwargs", "configuration_file", "_configuration_file", "_from_model_config"),
}


def keywords():
    """What `from_pretrained` of models and configurations takes, as its source has it."""
    found = set()
    for method in (
        PreTrainedModel.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        AutoConfig.from_pretrained,
        PreTrainedConfig.from_pretrained,
        PreTrainedConfig._get_config_dict,
    ):
        source = inspect.getsource(method)
        found |= set(inspect.signature(method).parameters)
        found |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', source))
        found |= set(re.findall(r'"(\w+)" in kwargs', source))
        for names in re.findall(r"(?:kwargs_names =|for name in) \[([^\]]*)\]", source):
            found |= set(re.findall(r'"(\w+)"', names))
    return found - ASIDE


def recipe(model):
    return parse_recipe(
        f"{{base: b, store: s, tasks: [{{name: t, train: a, test: b}}], model: {model}}}"
    )


def test_every_keyword_is_known():
    """A later version's further one fails here: find out what it does, then list it."""
    found = keywords()
    assert {"dtype", "torch_dtype", "device_map", "variant", "low_cpu_mem_usage"} <= found
    assert not found - {*HONOURED, *ALIASES, *HARMLESS, *REFUSED}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_would_do_harm_is_refused(key):
    value = key != "weights_only"
    with pytest.raises(RecipeError, match=f"^recipe: model: '{key}' is not an option here: "):
        recipe({key: value})
    if key != "revision":  # which is a parameter of its own
        with pytest.raises(ModelError, match=f"^loading a base: '{key}' is not an option here: "):
            load_base("anywhere", **{key: value})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{atn_implementation: sdpa}", "unknown option 'atn_implementation'; did you mean 'attn_"),
        ("{hidden_size: 12}", "unknown option 'hidden_size'; allowed: dtype, attn_implementation"),
        ("{dtype: float32, torch_dtype: bfloat16}", "dtype is float32, and bfloat16 by another"),
        ("{torch_dtype: bfloat16, dtype: float16}", "dtype is bfloat16, and float16 by another"),
        ("{device_map: meta}", "device_map: weights on 'meta' have no values to train"),
        ("{device_map: 'meta:0'}", "device_map: weights on 'meta' have no values to train"),
        ("{device_map: disk}", "device_map: weights on 'disk' have no values to train"),
        ("{device_map: {model: cpu, lm_head: disk}}", "device_map: weights on 'disk' have no"),
        ("{max_memory: {cpu: 1KB}}", "max_memory does nothing without device_map: auto or "),
        ("{device_map: cpu, max_memory: {cpu: 1KB}}", "max_memory does nothing without device_map"),
        ("{device_map: auto, max_memory: 1KB}", "max_memory must be a mapping from devices"),
        ("{use_safetensors: maybe}", "use_safetensors must be true or false, not 'maybe'"),
        ("{disable_mmap: 1}", "disable_mmap must be true or false, not 1"),
        ("{variant: 16}", "variant must be text, not 16"),
        ("{attn_implementation: 2}", "attn_implementation must be text, or a mapping"),
    ],
)
def test_options_that_are_not_known(model, message):
    with pytest.raises(RecipeError, match=f"^recipe: model: {message}"):
        recipe(model)


def test_options_under_the_names_of_today():
    assert recipe("{torch_dtype: bfloat16}").model == {"dtype": "bfloat16"}
    assert recipe("{torch_dtype: bfloat16, dtype: bfloat16}").model == {"dtype": "bfloat16"}
    usual = "{trust_remote_code: false, quantization_config: null, weights_only: true}"
    assert recipe(usual).model == recipe("{low_cpu_mem_usage: true, token: ''}").model == {}
    assert recipe("{subfolder: weights}").model == {"subfolder": "weights"}
    assert recipe("{device_map: null, max_memory: null, variant: null}").model == {}
    made = {"device_map": "auto", "max_memory": {"cpu": "1GB"}}
    assert recipe("{device_map: auto, max_memory: {cpu: 1GB}}").model == made
    assert recipe("{device_map: cpu, max_memory: {}}").model["device_map"] == "cpu"


def test_options_act(family_base, tmp_path):
    base = family_base("llama")
    for name in ("dtype", "torch_dtype"):
        for value in ("bfloat16", torch.bfloat16):
            assert mm_piece.load(base, **{name: value})[0].dtype == torch.bfloat16
    assert load_base(base, attn_implementation="eager")[0].config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="nonsense"):
        load_base(base, attn_implementation="nonsense")
    with pytest.raises(ModelError, match="pytorch_model.bin, found"):
        load_base(base, use_safetensors=False)
    with pytest.raises(ModelError, match="other"):
        load_base(base, variant="other")
    assert load_base(base, device_map="cpu", max_memory={})[0].device.type == "cpu"
    left, right = (load_base(base, **options)[0] for options in ({}, {"disable_mmap": True}))
    assert all(map(torch.equal, left.parameters(), right.parameters()))
    experts = load_base(family_base("qwen3_vl_moe"), experts_implementation="eager")[0]
    assert experts.config.get_text_config()._experts_implementation == "eager"


def test_weights_that_a_map_of_devices_leaves_elsewhere(family_base, monkeypatch):
    """They would have no values: whatever put them there, loading says it."""
    load = AutoModelForCausalLM.from_pretrained

    def leave_one(*args, **options):
        model, loaded = load(*args, **options)
        model.lm_head.to("meta")
        return model, loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", leave_one)
    with pytest.raises(ModelError, match="^device_map leaves 1 weights off .*'lm_head.weight'"):
        load_base(family_base("llama"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"device_map": "nowhere"}, "^device_map: 'nowhere': Expected one of"),
        ({"device_map": {"": "nowhere"}}, "^device_map: 'nowhere': Expected one of"),
        ({"device_map": "cuda:99"}, "^device_map: 'cuda:99': "),
        ({"attn_implementation": "nonsense"}, "nonsense"),
        ({"experts_implementation": "eager"}, "experts_implementation does nothing: the base has"),
    ],
)
def test_options_that_do_not_fit_are_seen_by_check_too(family_base, tmp_path, model, message):
    content = [{"prompt": "Which?", "answer": "red"}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    rows = str(tmp_path / "rows.json")
    asked = parse_recipe(
        json.dumps(
            {
                "base": str(family_base("llama")),
                "store": str(tmp_path / "store"),
                "tasks": [{"name": "t", "train": rows, "test": rows}],
                "model": model,
            }
        )
    )
    for command in (check, mm_piece.train):
        with pytest.raises(ModelError, match=message) as caught:
            command(asked)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "store" / "store.json").exists()


def test_a_revision_goes_with_a_base(tmp_path):
    with pytest.raises(StoreError, match="revision goes with a base"):
        mm_piece.load(store=tmp_path, revision="main")
