"""Law 9 on published chat templates: those in TRL's wheel, and others that are known to be odd.

A template is put into a tiny base of each kind, with the special tokens that it writes and the
base's own image token. What is right stands here by hand: what ends an answer, and what a template
writes between a prompt and an answer.
"""

import importlib.util
import json
import re
import shutil
import sys
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import torch
from newer_families import ALL_TEXT, NEWER
from PIL import Image
from tiny_families import BUILDERS, TEXT
from transformers import AutoModelForCausalLM

from mm_piece.data import (
    IGNORE_INDEX,
    Example,
    collate,
    encode,
    encode_prompt,
    encode_truncated,
    tokenizer_of,
)
from mm_piece.data.answers import extract_answer, find_omitted_texts
from mm_piece.data.chat_template import find_default_system_prompt
from mm_piece.data.prompts import render_prompt, turn_end_token_of, turn_end_tokens_of
from mm_piece.data.thoughts import THOUGHT_FIELDS, split_thoughts
from mm_piece.errors import DataError, ModelError, PieceError
from mm_piece.evaluation.answers import generate_batch
from mm_piece.models.base import load_processor

# The `test` extra brings trl, whose wheel holds published templates; only its data files are read.
if sys.version_info < (3, 11):
    pytest.skip("trl needs Python 3.11", allow_module_level=True)
_TRL = importlib.util.find_spec("trl")
assert _TRL and _TRL.origin, 'trl is absent: pip install -e ".[test]"'
_FOLDER = Path(_TRL.origin).parent / "chat_templates"
PUBLISHED = sorted(file.stem for file in _FOLDER.glob("*.jinja"))


# What ends an answer in the templates whose names begin so; the longest name counts.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron_3": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
EARLIER = {"gptoss": "<|end|>"}  # where another token ends an answer that is not the last
# What a model has to say before its answer; a blank in front of any is not looked at.
LEADS = {
    "deepseek": "</think>\n\n",
    "gptoss": "<|channel|>final<|message|>",
    "muse_glimmer": "to=user<|message|>",
}
FIRST_LEADS = {**LEADS, "deepseek": ""}  # earlier answers have no thoughts
NO_SYSTEM = ("gemma", "gemma_training")
ODD = {
    # In words of its authors: a blank and a line break, where the prompt has a line break alone.
    "llava_onevision": (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% endif %}{% endfor %}{% for c in m.content %}"
        "{% if c.type == 'text' %}{{ '\\n' + c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>\n' + system + "
        "'\n<</SYS>>\n\n' if loop.first and system else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
}


def of(table, name):
    """The entry for a template, by the longest beginning of its name."""
    found = [key for key in table if name.startswith(key)]
    return table[max(found, key=len)] if found else ""


def message(role, text, images=0, **more):
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": role, "content": parts, **more}


def example(*answers, images=0, system=None, **more):
    """A conversation: an image stands in the first question, the others in the second."""
    turns = [message("system", system)] if system else []
    for number, answer in enumerate(answers):
        shown = images if len(answers) == 1 else (min(images, 1), max(images - 1, 0), 0)[number]
        turns += [message("user", f"Question {number}?", shown), message("assistant", answer)]
    turns[-1] |= more
    pictures = [Image.new("RGB", (20 + 8 * n, 20), (200, 9, 9)) for n in range(images)]
    return Example(0, turns, pictures, "rows.json")


@cache
def image_token(template):
    """What a template writes for an image; nothing if it shows none."""
    bare = BUILDERS["llama"]()[1]
    texts = []
    for images in (0, 1):
        turns = [message("user", "A?", images), message("assistant", "b")]
        try:
            texts.append(bare.apply_chat_template(turns, chat_template=template, tokenize=False))
        except Exception:
            return ""
    tokens = [re.findall(r"<[^<>\s]+>", text) for text in texts]
    more = [token for token in tokens[1] if token not in tokens[0]]
    return next((t for t in more if "start|" not in t and "end|" not in t), "")


def processor_with(template, family):
    """The processor of a tiny base with a template, and its special tokens, of its own."""
    processor = (BUILDERS | NEWER)[family]()[1]
    tokenizer = tokenizer_of(processor)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = "<s>"
    if family not in ALL_TEXT and (token := image_token(template)):
        template = template.replace(token, processor.image_token)
    processor.chat_template = template
    shown = render_prompt(example("a", "b"), processor)
    found = set(re.findall(r"<[^<>\s]+>", shown + template)) - {"<think>", "</think>"}
    written = sorted(t for t in found if not set(t) & set("'\"{}=/") or t == "</s>")
    tokenizer.add_special_tokens(
        {"extra_special_tokens": written}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens(["<think>", "</think>"])  # tokens, but not special, as in Qwen3
    return processor


def template_named(name):
    return ODD[name] if name in ODD else (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def runs_of(encoded, processor):
    """The supervised runs, as texts."""
    pairs = zip(encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist(), strict=True)
    runs = [[*run] for key, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX) if key]
    assert all(token == label for run in runs for token, label in run)
    return [tokenizer_of(processor).decode([token for token, _ in run]) for run in runs]


def require_right(name, shown, processor):
    """What is supervised is each answer with its end, and the prompt begins the row."""
    encoded = encode(shown, processor)
    answers = [m["content"][-1]["text"] for m in shown.messages if m["role"] == "assistant"]
    end = of(ENDS, name)
    expected = [of(FIRST_LEADS, name) + a + (of(EARLIER, name) or end) for a in answers[:-1]]
    expected.append(of(LEADS, name) + answers[-1] + end)
    runs = runs_of(encoded, processor)
    assert [run.lstrip() for run in runs] == expected

    asked = encode_prompt(shown, processor)
    length = asked["input_ids"].shape[1]
    assert encoded["input_ids"][0, :length].tolist() == asked["input_ids"][0].tolist()
    assert (encoded["labels"][0, length:] != IGNORE_INDEX)[0]
    for key, value in asked.items():
        assert torch.equal(encoded[key][:, :length] if key in PER_TOKEN else encoded[key], value)

    said = runs[-1].removesuffix(end)
    assert extract_answer(said, shown, processor).strip() == answers[-1]
    if shown.images:
        image = encoded["input_ids"] == processor.image_token_id
        assert image.any()
        assert (encoded["labels"][image] == IGNORE_INDEX).all()
    return encoded


PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def require_published_prompt(shown, processor):
    """The prompt is what transformers asks with the template, in the form that it takes."""
    tokenizer, template = tokenizer_of(processor), processor.chat_template
    turns = shown.messages[:-1]
    plain = [{**turn, "content": turn["content"][0]["text"]} for turn in turns]
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    asked = set()
    for given in (turns, plain):
        try:
            text = tokenizer.apply_chat_template(given, enable_thinking=False, **options)
        except Exception:
            continue
        asked.add(text.removeprefix(tokenizer.bos_token))
    assert render_prompt(shown, processor).removeprefix(tokenizer.bos_token) in asked


def require_all(name, family):
    """A template in a family: one turn and several, with a system message and without, images."""
    template = template_named(name)
    processor = processor_with(template, family)
    rows = [example("a dog"), example("a cat", "two.", "nine dogs")]
    if "strftime_now" not in template:
        require_published_prompt(rows[1], processor)
    if name in NO_SYSTEM:
        with pytest.raises(DataError, match="System role not supported; .* into the question"):
            encode(example("a dog", system="Be short."), processor)
    else:
        rows += [example("a dog", system="Be short."), example("a", "b", system="Be short.")]
    if family not in ALL_TEXT and image_token(template):
        rows += [example("a", "b", images=1), example("a", "b", "c", images=3)]
    elif family not in ALL_TEXT:
        with pytest.raises(DataError, match="chat template shows none"):
            encode(example("a", images=1), processor)
    encoded = [require_right(name, row, processor) for row in rows]
    assert of(ENDS, name).endswith(turn_end_token_of(processor))
    assert turn_end_token_of(processor) in turn_end_tokens_of(processor)
    assert not find_omitted_texts(rows[-1], processor)
    batch = collate(encoded, tokenizer_of(processor).pad_token_id)
    for row, single in enumerate(encoded):
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["labels"][row, :length], single["labels"][0])
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()


VISION = [family for family in BUILDERS if family not in TEXT]


def families_of(name):
    """One family of either kind, all in turn; of either kind for the second version of a template.

    As a script, this file tries each template in all families.
    """
    number = PUBLISHED.index(name)
    if not name.endswith("_training"):
        return [TEXT[number % len(TEXT)], VISION[number % len(VISION)]]
    return [(TEXT, VISION)[number // 2 % 2][number % 5]]


@pytest.mark.parametrize(
    "name, family", [(name, family) for name in PUBLISHED for family in families_of(name)]
)
@pytest.mark.slow
def test_published_templates(name, family):
    require_all(name, family)


@pytest.mark.parametrize(
    "name, family",
    [
        ("gemma3", "gemma3"),
        ("gemma3", "gemma3_text"),
        ("idefics3", "idefics3"),
        ("phi3", "phi3"),
        ("phi3_5", "phi3"),
        ("qwen3_5_nothink", "qwen3_5"),
        ("qwen3_5_think", "qwen3_5"),
        ("smolvlm", "smolvlm"),
    ],
)
@pytest.mark.slow
def test_published_templates_in_their_own_families(name, family):
    require_all(name, family)


def test_published_templates_are_tried_in_every_family():
    assert {family for name in PUBLISHED for family in families_of(name)} == {*BUILDERS}


def test_published_templates_with_images_are_many():
    assert sum(bool(image_token(template_named(name))) for name in PUBLISHED) >= 20


@pytest.mark.parametrize("family", VISION)
def test_a_prompt_that_a_template_writes_otherwise_than_its_rows(family):
    """The row begins with the prompt: what is trained is what is asked (LLaVA-OneVision's)."""
    processor = processor_with(ODD["llava_onevision"], family)
    for row in (example("a dog"), example("a", "b", images=1), example("a", "b", "c", images=3)):
        encoded = require_right("qwen", row, processor)
        text = tokenizer_of(processor).decode(encoded["input_ids"][0])
        last = row.messages[-1]["content"][0]["text"]
        assert f"<|im_start|>assistant\n{last}<|im_end|>" in text
        assert text.count("<|im_start|>assistant \n") == len(row.messages) // 2 - 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "llava"])
def test_a_blank_before_the_end_token_hides_it_in_no_turn(family):
    processor = processor_with(ODD["llama2"], family)
    end = tokenizer_of(processor).eos_token
    for row in (example("a dog"), example("a cat", "two.", "nine dogs", system="Be short.")):
        runs = runs_of(encode(row, processor), processor)
        answers = [m["content"][0]["text"] for m in row.messages if m["role"] == "assistant"]
        assert [run.strip() for run in runs] == [f"{answer} {end}" for answer in answers]
    assert turn_end_tokens_of(processor) == {end}


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_every_answer_ends_where_a_template_ends_none(family):
    """LLaVA-1.5's: what ends an earlier answer stands in the prompt of a later one too."""
    processor = BUILDERS[family]()[1]
    shown = example("a cat", "two.", "nine dogs", images=2)
    encoded = encode(shown, processor)
    expected = ["a cat</s>", "two.</s>", "nine dogs</s>"]
    assert [run.strip() for run in runs_of(encoded, processor)] == expected
    asked = encode_prompt(shown, processor)["input_ids"][0].tolist()
    assert encoded["input_ids"][0, : len(asked)].tolist() == asked
    assert "ASSISTANT: a cat</s>" in tokenizer_of(processor).decode(asked)


THOUGHTS = {  # what is supervised of an answer with the thoughts "hm"
    **dict.fromkeys(("qwen3", "qwen3_training"), "<think>\nhm\n</think>\n\na dog"),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), "hm\n</think>\n\na dog"),
    **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), "hm\n</think>\n\na dog"),
    "glm4moe": "\n<think>hm</think>\na dog",
    "nemotron_3_nano": "hm\n</think>\na dog",
    "nemotron_3_ultra": "hm</think>a dog",
    "lfm2_2_5": "<think>hm</think>a dog",
    "gemma4_v5": "<|channel>thought\nhm\n<channel|>a dog",
    "gptoss": "<|channel|>analysis<|message|>hm<|end|>"
    "<|start|>assistant<|channel|>final<|message|>a dog",
    "muse_glimmer": " to=self<|message|>hm<|eom|><|start|>assistant to=user<|message|>a dog",
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_in_a_field_are_learned(name):
    """Whatever the field is called."""
    field = THOUGHT_FIELDS[[*THOUGHTS].index(name) % len(THOUGHT_FIELDS)]
    family = "qwen3_vl" if "qwen3_" in name else "qwen3"
    processor = processor_with(template_named(name), family)
    shown = example("a cat", "a dog", **{field: "hm"})
    encoded = encode(shown, processor)
    assert runs_of(encoded, processor)[-1] == THOUGHTS[name] + of(ENDS, name)
    asked = encode_prompt(shown, processor)["input_ids"][0]
    assert encoded["input_ids"][0, : len(asked)].tolist() == asked.tolist()
    said = THOUGHTS[name].replace("hm", "something else")
    assert extract_answer(said, shown, processor).strip() == "a dog"
    assert not find_omitted_texts(shown, processor)


IN_TEXT = "<think>\nhm\n</think>\n\na dog"


@pytest.mark.parametrize("name", [*THOUGHTS, "llama3", "qwen2_5", "gemma3"])
def test_thoughts_in_an_answer_are_learned(name):
    """As the template reads them, else as the text that they are; never after empty thoughts."""
    family = "qwen3_vl" if "qwen3_" in name else "qwen3"
    processor = processor_with(template_named(name), family)
    shown = example("a cat", IN_TEXT)
    (*_, run) = runs_of(encode(shown, processor), processor)
    said = run.removesuffix(of(ENDS, name))
    assert "".join(said.split()).endswith("hm</think>adog")
    assert run.count("</think>") == 1
    before = render_prompt(shown, processor)
    assert not before.rstrip().endswith("</think>")
    # What was trained is, with the tag that the prompt holds, the row's answer.
    found = extract_answer(said, shown, processor)
    assert "".join(found.split()).endswith("<think>hm</think>adog")


def test_thoughts_that_a_template_has_no_place_for_are_named():
    processor = processor_with(template_named("llama3"), "llama")
    assert find_omitted_texts(example("a dog", reasoning_content="hm"), processor)
    assert not find_omitted_texts(example("a dog"), processor)
    # Qwen3 shows no thoughts of earlier answers.
    processor = processor_with(template_named("qwen3"), "qwen3")
    assert find_omitted_texts(example(IN_TEXT, "a dog"), processor)
    assert not find_omitted_texts(example("a cat", IN_TEXT), processor)


def test_thoughts_that_hold_an_image_token_are_refused():
    processor = BUILDERS["qwen2_vl"]()[1]
    with pytest.raises(DataError, match=r"the text holds .*, which the base reads as"):
        encode(example("a dog", thinking="what is <|image_pad|>?"), processor)


def test_a_model_that_always_thinks_learns_plain_answers():
    """Qwen3-Thinking's: its prompt opens thoughts, in whose line break a token would end."""
    template = template_named("qwen3")
    start = template.rindex("{%- if add_generation_prompt %}")
    asks = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    processor = processor_with(template[:start] + asks, "qwen3")
    tokenizer_of(processor).add_tokens(["\n\n"])  # as Qwen's tokenizer has one
    shown = example("a dog")
    encoded = encode(shown, processor)
    assert runs_of(encoded, processor) == ["\n</think>\n\na dog<|im_end|>"]
    asked = encode_prompt(shown, processor)["input_ids"][0]
    assert encoded["input_ids"][0, : len(asked)].tolist() == asked.tolist()
    assert extract_answer("\n</think>\n\na dog", shown, processor).strip() == "a dog"
    assert extract_answer("well\n</think>\n\na dog", shown, processor).strip() == "a dog"


@pytest.mark.parametrize("name", ["gptoss", "cohere2", "glm4moe", "qwen3", "deepseekv3", "phi3"])
def test_a_model_that_says_what_was_trained_answers_right(name, monkeypatch):
    """Generation stops at the token that ends an answer; what stands before it is no part of it."""
    processor = processor_with(template_named(name), "llama")
    model = AutoModelForCausalLM.from_config(BUILDERS["llama"]()[0])
    model.resize_token_embeddings(len(processor))
    rows = [example("a dog"), example("a cat", "two <|eom_id|> words", system="Be short.")]
    processor.add_special_tokens({"extra_special_tokens": ["<|eom_id|>"]}, False)
    told = [encode(row, processor) for row in rows]
    more = processor("more", add_special_tokens=False)["input_ids"]
    width = max(encode_prompt(row, processor)["input_ids"].shape[1] for row in rows)

    def say(input_ids, generation_config, **_):
        """What was trained, and more after it."""
        ends = {*generation_config.eos_token_id}
        said = []
        for row in told:
            labels = groupby(row["labels"][0].tolist(), key=lambda label: label != IGNORE_INDEX)
            *_, run = ([*labels] for learned, labels in labels if learned)
            assert run[-1] in ends
            assert not set(run[:-1]) & ends
            said.append(torch.tensor(run + more))
        assert input_ids.shape[1] == width
        return torch.cat([input_ids, torch.nn.utils.rnn.pad_sequence(said, True)], dim=1)

    monkeypatch.setattr(model, "generate", say)
    answers = generate_batch(model, processor, rows, max_new_tokens=99)
    assert answers == ["a dog", "two <|eom_id|> words"]
    plain = generate_batch(model, processor, rows, max_new_tokens=99, skip_special_tokens=True)
    assert [" ".join(text.split()) for text in plain] == ["a dog", "two words"]


def test_another_answer_has_no_thoughts_of_the_one_before():
    shown = example("a cat", "a dog", reasoning_content="hm")
    assert split_thoughts(shown.messages[-1])[0] == "hm"
    own = shown.with_answer("a bird")
    assert own.answer == "a bird"
    assert split_thoughts(own.messages[-1])[0] == ""


@pytest.mark.parametrize("inside", [True, False], ids=["in the text", "in a field"])
def test_long_thoughts_lose_their_end(inside):
    processor = processor_with(template_named("qwen3"), "qwen3")
    long = "so many words " * 60
    shown = example(IN_TEXT.replace("hm", long)) if inside else example("a dog", thinking=long)
    encoded, cut = encode_truncated(shown, processor, 90)
    assert cut and encoded["input_ids"].shape[1] <= 90
    (run,) = runs_of(encoded, processor)
    assert run.startswith("<think>\nso many words so")
    assert run.endswith("\n</think>\n\na dog<|im_end|>")


@pytest.mark.parametrize("name", [n for n in PUBLISHED if "strftime_now" in template_named(n)])
def test_a_row_is_the_same_on_every_day(name, monkeypatch):
    import transformers.utils.chat_template_utils as clock

    class Later(clock.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    processor = processor_with(template_named(name), "llama")
    first = encode(example("a dog"), processor)["input_ids"]
    monkeypatch.setattr(clock, "datetime", Later)
    assert torch.equal(encode(example("a dog"), processor)["input_ids"], first)
    text = processor.decode(first[0])
    assert "26 Jul 2024" in text or "2024-07-26" in text


def test_every_way_to_write_the_day():
    processor = BUILDERS["llama"]()[1]
    processor.chat_template = (
        "\n{{ strftime_now('%A %-d. %B %Y, %H:%M %j %%') }}|" + processor.chat_template
    )
    begun = render_prompt(example("a dog"), processor)
    assert begun.startswith("\nFriday 26. July 2024, 00:00 208 %|<|begin_of_text|>")


@pytest.mark.parametrize("family", ["llama", "gemma2", "llava"])
def test_a_text_begins_although_the_tokenizer_would_end_it_too(family):
    processor = BUILDERS[family]()[1]
    tokenizer = tokenizer_of(processor)
    processor.chat_template = processor.chat_template.replace("{{ bos_token }}", "")
    tokenizer.add_bos_token, tokenizer.add_eos_token = True, True
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    encoded = encode(example("a dog"), processor)["input_ids"][0].tolist()
    assert encoded.count(tokenizer.bos_token_id) == 1
    assert encoded[0] == tokenizer.bos_token_id


def test_a_text_does_not_begin_with_what_the_tokenizer_only_ends_it_with():
    """GPT-2 and others have one token for both."""
    processor = BUILDERS["qwen2"]()[1]
    processor.bos_token = processor.eos_token
    processor.add_bos_token, processor.add_eos_token = False, True
    assert processor("")["input_ids"] == [processor.eos_token_id]
    assert not render_prompt(example("a dog"), processor).startswith(processor.eos_token)


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_of_several_templates_the_default_is_used(family):
    processor = BUILDERS[family]()[1]
    expected = encode(example("a dog"), processor)["input_ids"]
    processor.chat_template = {"rag": "no", "default": processor.chat_template, "tool_use": "no"}
    assert torch.equal(encode(example("a dog"), processor)["input_ids"], expected)
    del processor.chat_template["default"]
    with pytest.raises(ModelError, match="rag, tool_use, and none is called 'default'"):
        encode(example("a dog"), processor)


@pytest.mark.filterwarnings("ignore")  # transformers leaves the further templates' files open
@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
@pytest.mark.parametrize("file", ["additional_chat_templates/rag.jinja", "tokenizer_config.json"])
def test_templates_as_they_lie_in_a_folder(family, file, family_base, tmp_path):
    base = shutil.copytree(family_base(family), tmp_path / "base")
    expected = encode(example("a dog"), load_processor(base))["input_ids"]
    own = base / "chat_template.jinja"
    if file.endswith("json"):  # where older repositories keep it
        config = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps({**config, "chat_template": own.read_text()}))
        own.unlink()
    else:
        (base / file).parent.mkdir()
        (base / file).write_text("no")
    assert torch.equal(encode(example("a dog"), load_processor(base))["input_ids"], expected)
    if not file.endswith("json"):
        own.unlink()
        with pytest.raises(ModelError, match="save the one to use as chat_template.jinja"):
            encode(example("a dog"), load_processor(base))


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_content_is_given_in_the_form_that_comes_out(family, typed):
    """A template that takes one form only writes the other as nothing, or as Python does."""
    text = "{{ m.content[0].text }}" if typed else "{{ m.content }}"
    processor = BUILDERS[family]()[1]
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + text + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    shown = example("a dog", system="Be short.")
    text = tokenizer_of(processor).decode(encode(shown, processor)["input_ids"][0])
    assert text == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nQuestion 0?<|im_end|>\n"
        "<|im_start|>assistant\na dog<|im_end|>\n"
    )


def test_what_a_template_leaves_out_is_told():
    processor = BUILDERS["qwen2"]()[1]
    processor.chat_template = "{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError, match="chat template leaves out the user's texts"):
        encode(example("a dog"), processor)
    keeps = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    processor.chat_template = keeps
    assert find_omitted_texts(example("a dog", system="Be short."), processor)
    assert not find_omitted_texts(example("a dog"), processor)


def test_an_answer_that_nothing_could_end_is_refused():
    processor = BUILDERS["qwen2"]()[1]
    processor.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    processor.eos_token = None
    with pytest.raises(ModelError, match="ends no answer .* give the tokenizer an eos_token"):
        encode(example("a dog"), processor)


@pytest.mark.parametrize("chat", [True, False])
def test_a_refusal_is_one_line(chat):
    processor = BUILDERS["llama"]()[1]
    processor.chat_template = "{{ raise_exception('no\n\x1b[31m\nway') }}" if chat else "{% if %}"
    with pytest.raises(PieceError) as error:
        encode(example("a dog"), processor)
    assert str(error.value).isprintable()
    assert ("rows.json row 0" in str(error.value)) == chat


@pytest.mark.parametrize("family", ["llava", "qwen2"])
@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}{{ m.content ", "has an error in line 1: unexpected end of temp"),
        ("{# a line #}\n\n{% fro m in messages %}", "in line 3: Encountered unknown tag 'fro'"),
        ("{% if messages %}{{ messages }}", "in line 1: Unexpected end of template"),
        ("{{ messages | reversed }}", "in line 1: No filter named 'reversed'"),
        ("{{ 'a' + }}", "in line 1: "),
    ],
)
def test_a_template_with_an_error_is_named(family, template, message):
    processor = BUILDERS[family]()[1]
    processor.chat_template = template
    for shown in (example("a"), *([example("a", images=1)] if family not in TEXT else [])):
        for encoded in (encode, encode_prompt):
            with pytest.raises(ModelError, match=f"the base's chat template .*{message}") as told:
                encoded(shown, processor)
            assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('not today') }}", "refuses it: not today"),
        ("{{ messages[0].content | tojson }}{{ now() }}", "refuses it: 'now' is undefined"),
        ("{{ messages[7].content[0].text.strip() }}", "refuses it: .* has no element 7"),
    ],
)
def test_a_template_that_refuses_images_says_why(template, message):
    processor = BUILDERS["llava"]()[1]
    processor.chat_template = template
    for shown in (example("a"), example("a", images=1)):
        with pytest.raises(DataError, match=message):
            encode(shown, processor)


@pytest.mark.parametrize("family", ["llava", "qwen2"])
def test_a_template_may_refuse_what_it_is_probed_with(family):
    processor = BUILDERS[family]()[1]
    shown = example("a dog", images=int(family == "llava"))
    expected = encode(shown, processor)["input_ids"]
    processor.chat_template = (
        "{% for m in messages if m.role == 'user' and '\ue000' in m.content | tojson %}"
        "{{ raise_exception('odd') }}{% endfor %}"
    ) + tokenizer_of(processor).chat_template
    assert encode(shown, processor)["input_ids"].equal(expected)


if __name__ == "__main__":  # every template in every family: minutes
    import sys
    import traceback

    bad = 0
    for template in sys.argv[1:] or [*PUBLISHED]:
        for kind in BUILDERS:
            try:
                require_all(template, kind)
            except BaseException as error:
                bad += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                print(template, kind, repr(error)[:600], place.name, place.lineno)
    print("wrong:", bad)


# Templates that write a system text of their own where a row has none.
SYSTEM_PROMPTS = {
    "muse_glimmer": "You are a helpful AI assistant.\nKnowledge cutoff: 2026-01-04.",
    "qwen2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2_5_vl": "You are a helpful assistant.",
}


@pytest.mark.parametrize("stem", PUBLISHED)
def test_a_template_s_own_system_prompt_is_found(stem):
    processor = processor_with((_FOLDER / f"{stem}.jinja").read_text(), "llama")
    expected = SYSTEM_PROMPTS.get(stem.removesuffix("_training"), "")
    found = find_default_system_prompt(processor)
    assert found.startswith(expected) and bool(found) == bool(expected)
