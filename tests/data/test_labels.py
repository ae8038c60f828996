"""Law 9 on every family's chat template: labels cover the answers' tokens only."""

from dataclasses import replace

import pytest
import torch
from newer_families import ALL, ALL_TEXT
from PIL import Image

from mm_piece.data import (
    IGNORE_INDEX,
    EncodedDataset,
    Example,
    collate,
    encode,
    encode_prompt,
    encode_truncated,
    token_ids_of,
    tokenizer_of,
)
from mm_piece.data.prompts import turn_end_token_of
from mm_piece.errors import DataError, ModelError
from mm_piece.models.base import load_base, load_processor

# What ends an answer in each family's published template; LLaVA's ends none and gets its own.
ENDS = {
    **dict.fromkeys(("llava", "llava_next"), "</s>"),
    **dict.fromkeys(("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|im_end|>"),
    **dict.fromkeys(("qwen3_vl_moe", "qwen2", "qwen3"), "<|im_end|>"),
    **dict.fromkeys(("llama", "mistral"), "<|eot_id|>"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "<end_of_turn>"),
    **dict.fromkeys(("qwen3_5", "internvl", "smollm3"), "<|im_end|>"),
    **dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>"),
    **dict.fromkeys(("mistral3", "llava (Pixtral)", "vipllava", "llava_next_video"), "</s>"),
    **dict.fromkeys(("phi3", "olmo2"), "<|eot_id|>"),
}


LLAVA = ("llava", "llava_next", "llava_next_video", "vipllava")
TOKEN_INPUTS = {"input_ids", "labels", "attention_mask", "mm_token_type_ids", "token_type_ids"}


@pytest.fixture(params=ALL)
def family(request):
    return request.param


@pytest.fixture
def processor(family, family_base):
    return load_processor(family_base(family))


def message(role, *parts):
    return {
        "role": role,
        "content": [
            {"type": "image"} if part is None else {"type": "text", "text": part} for part in parts
        ],
    }


def picture(width=40, height=20, shade=90):
    return Image.linear_gradient("L").resize((width, height)).point(lambda p: p % shade)


def conversation(family, *turns, pictures=()):
    """Questions and answers in turn; a picture stands before each of the first questions."""
    pictures = [] if family in ALL_TEXT else list(pictures)
    messages = []
    for number, (question, answer) in enumerate(turns):
        image = [None] if number < len(pictures) else []
        messages += [message("user", *image, question), message("assistant", answer)]
    return Example(0, messages, [p.convert("RGB") for p in pictures], "rows.json")


def supervised(processor, encoded):
    labels = encoded["labels"][0]
    return tokenizer_of(processor).decode(labels[labels != IGNORE_INDEX])


def test_every_family_has_an_end(family, processor):
    assert turn_end_token_of(processor) == ENDS[family]


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", ["a red box", "5", "Yes.", "红色", "two\nlines", '{"a": [1, 2]}']
)
def test_the_answer_alone_is_supervised(family, processor, answer):
    example = conversation(family, ("What is it?", answer), pictures=[picture()])
    encoded = encode(example, processor)
    assert supervised(processor, encoded).lstrip(" ") == answer + ENDS[family]


def test_the_prompt_begins_what_is_trained(family, processor):
    """What generation starts from is what stands before the first supervised token."""
    example = conversation(family, ("What is it?", "a dog"), pictures=[picture()])
    encoded = encode(example, processor)
    before = encode_prompt(example, processor)["input_ids"][0]
    first = int((encoded["labels"][0] != IGNORE_INDEX).nonzero()[0])
    assert encoded["input_ids"][0][:first].tolist() == before.tolist()


def test_every_turn_is_supervised(family, processor):
    turns = [("What is it?", "a cat"), ("How many?", "two."), ("And here?", "nine dogs")]
    example = conversation(family, *turns, pictures=[picture(), picture(20, 50)])
    encoded = encode(example, processor)
    found = supervised(processor, encoded)
    last = turns[-1][1] + ENDS[family]
    assert found.replace(ENDS[family], "").replace(" ", "") == "acattwo.ninedogs"
    assert found.endswith(last)
    if family not in LLAVA:  # their template ends no turn but the last
        space = " " if family in ("idefics3", "smolvlm") else ""  # the prompt ends before it
        assert found == "".join(space + answer + ENDS[family] for _, answer in turns)


def test_a_system_message_is_not_supervised(family, processor):
    example = conversation(family, ("What is it?", "a cat"), pictures=[picture()])
    example = replace(example, messages=[message("system", "Be short."), *example.messages])
    if family in ("llama", "mistral", "gemma2") or "<|im_start|>" in str(processor.chat_template):
        encoded = encode(example, processor)
        assert supervised(processor, encoded).lstrip(" ") == "a cat" + ENDS[family]
        assert "Be short." in tokenizer_of(processor).decode(encoded["input_ids"][0])


def test_image_tokens_are_never_supervised(family, processor):
    if family in ALL_TEXT:
        return
    example = conversation(family, ("What is it?", "a cat"), pictures=[picture()])
    encoded = encode(example, processor)
    image = encoded["input_ids"] == processor.image_token_id
    assert image.sum() > 0
    assert (encoded["labels"][image] == IGNORE_INDEX).all()


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 1, 7, 20])
def test_long_questions_lose_their_middle(family, processor, room):
    short = conversation(family, ("Say. End?", "yes"), pictures=[picture()])
    question = "Say. " + "a long story with many words, " * 30 + "End?"
    long = conversation(family, (question, "yes"), pictures=[picture()])
    most = encode(short, processor)["input_ids"].shape[1] + 8 + room
    encoded, cut = encode_truncated(long, processor, most)
    assert cut
    assert most - 4 <= encoded["input_ids"].shape[1] <= most
    assert supervised(processor, encoded).lstrip(" ") == "yes" + ENDS[family]
    text = tokenizer_of(processor).decode(encoded["input_ids"][0])
    assert "Say" in text
    assert "nd?" in text
    whole = encode(long, processor)
    for key in whole.keys() - TOKEN_INPUTS:
        assert torch.equal(encoded[key], whole[key])  # images are untouched
    if family not in ALL_TEXT:
        image = processor.image_token_id
        assert (encoded["input_ids"] == image).sum() == (whole["input_ids"] == image).sum()
    prompt, cut = encode_truncated(long, processor, most - 6, generation=True)
    assert cut
    assert prompt["input_ids"].shape[1] <= most - 6


def test_long_answers_lose_their_end(family, processor):
    example = conversation(family, ("Say.", "one two three four five " * 40), pictures=[picture()])
    short = conversation(family, ("Say.", "one"), pictures=[picture()])
    most = encode(short, processor)["input_ids"].shape[1] + 10
    encoded, cut = encode_truncated(example, processor, most)
    assert cut
    assert encoded["input_ids"].shape[1] <= most
    assert supervised(processor, encoded).lstrip(" ").startswith("one two")
    assert supervised(processor, encoded).endswith(ENDS[family])


def test_what_fits_is_left_alone(family, processor):
    example = conversation(family, ("Say.", "one"), pictures=[picture()])
    whole = encode(example, processor)
    for most in (None, whole["input_ids"].shape[1]):
        encoded, cut = encode_truncated(example, processor, most)
        assert not cut
        assert all(torch.equal(encoded[key], whole[key]) for key in whole)


def test_images_that_are_too_long_alone_are_named(family, processor):
    example = conversation(family, ("Say.", "one"), pictures=[picture()])
    with pytest.raises(DataError, match=r"rows\.json row 0: max_length 5 leaves no room"):
        encode_truncated(example, processor, 5)


def test_a_literal_image_token_is_refused(family, processor):
    if family in ALL_TEXT:
        return
    plain = conversation(family, ("What?", "x"), pictures=[picture()])
    shown = encode(plain, processor)["input_ids"][0].tolist()
    template = token_ids_of(plain, processor)
    written = {processor.image_token_id} | ({*shown} - {*template})
    tokens = tokenizer_of(processor).convert_ids_to_tokens(sorted(written))
    special = [token for token in tokens if token in tokenizer_of(processor).all_special_tokens]
    assert processor.image_token in special
    for token in special:  # the image's own, and the marks around it
        example = conversation(family, (f"What does {token} mean?", "x"), pictures=[picture()])
        with pytest.raises(DataError, match=r"rows\.json row 0: the text holds '.*', which the"):
            encode(example, processor)


def test_an_image_needs_a_model_that_sees(family, processor):
    if family not in ALL_TEXT:
        return
    example = conversation(family, ("What is it?", "x"))
    with pytest.raises(DataError, match="row 0 has an image, but the base is a text model"):
        encode(replace(example, images=[picture()]), processor)


def test_a_text_model_without_template_gets_a_plain_one(family, processor):
    if family not in ALL_TEXT:
        return
    processor.chat_template = None
    encoded = encode(conversation(family, ("2 + 2?", "4")), processor)
    text = processor.decode(encoded["input_ids"][0])
    assert text == f"2 + 2?\n4{processor.eos_token}"
    assert supervised(processor, encoded) == f"4{processor.eos_token}"


def test_a_processor_without_template_is_named(family, processor):
    if family in ALL_TEXT:
        return
    processor.chat_template = None
    with pytest.raises(ModelError, match="the base's processor has no chat template"):
        encode(conversation(family, ("2 + 2?", "4")), processor)


def test_what_a_template_refuses_names_the_row(family, processor):
    processor.chat_template = "{{ raise_exception('no systems here') }}"
    with pytest.raises(DataError, match=r"rows\.json row 0: .* refuses it: no systems here"):
        encode(conversation(family, ("2 + 2?", "4")), processor)


def test_a_prompt_that_begins_nothing_is_refused(family, processor):
    broken = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    processor.chat_template = broken
    with pytest.raises(ModelError, match="not a prefix"):
        encode(conversation(family, ("2 + 2?", "4")), processor)


def mixed(family):
    """Rows with two, one and no images, of several sizes."""
    return [
        conversation(family, ("A?", "one"), ("B?", "two"), pictures=[picture(), picture(20, 60)]),
        conversation(family, ("Which colour?", "deep red"), pictures=[picture(30, 30)]),
        conversation(family, ("2 + 2?", "4")),
    ]


@pytest.mark.slow
@torch.no_grad()
def test_a_batch_is_its_examples(family, family_base, processor):
    """Padding, tiles and images of other rows change no example's loss."""
    model = load_base(family_base(family))[0]
    encoded = [encode(example, processor) for example in mixed(family)]
    batch = collate(encoded, tokenizer_of(processor).pad_token_id)
    counts = [int((example["labels"][:, 1:] != IGNORE_INDEX).sum()) for example in encoded]
    single = [float(model(**example).loss) * n for example, n in zip(encoded, counts, strict=True)]
    assert float(model(**batch).loss) == pytest.approx(sum(single) / sum(counts), abs=2e-5)


def test_encoded_examples_are_kept_by_content(family, processor, tmp_path):
    examples = mixed(family)
    encoded = EncodedDataset(examples, processor, tmp_path)
    direct = [encode(example, processor) for example in examples]
    for again in range(2):
        for found, expected in zip(encoded, direct, strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found), again
    assert len(list(tmp_path.iterdir())) == len({example.compute_digest() for example in examples})
    assert torch.equal(encoded.select_positions([2, 0])[0]["input_ids"], direct[2]["input_ids"])
    assert [len(part) for part in (encoded[:1], encoded[1:])] == [1, 2]
    first = sorted(file.name for file in tmp_path.iterdir())
    changed = replace(examples[1], messages=[*examples[1].messages[:-1], message("assistant", "x")])
    other = EncodedDataset([changed, examples[2]], processor, tmp_path)
    assert supervised(processor, other[0]).lstrip(" ") == "x" + ENDS[family]
    assert len(other) == 2
    assert set(first) < {file.name for file in tmp_path.iterdir()}


def test_truncated_examples_are_told(family, processor, tmp_path):
    short = conversation(family, ("Say.", "one"), pictures=[picture()])
    long = conversation(family, ("Say " + "words " * 100, "one"), pictures=[picture()])
    most = encode(short, processor)["input_ids"].shape[1] + 5
    encoded = EncodedDataset([short, long], processor, tmp_path, most)
    for again in range(2):  # made, and then read
        assert [encoded.encode_truncated(position)[1] for position in range(2)] == [False, True], (
            again
        )
    assert max(example["input_ids"].shape[1] for example in encoded) <= most


def test_a_full_folder_takes_no_more(family, processor, tmp_path):
    examples = mixed(family)
    encoded = EncodedDataset(examples, processor, tmp_path, max_bytes=1)
    for _ in range(2):
        assert len([example["input_ids"] for example in encoded]) == 3
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(encoded[2]["input_ids"], encode(examples[2], processor)["input_ids"])


def test_long_texts_are_cut_to_one_length(family, processor):
    """A long answer does not cost the question, nor a long question the answer."""
    question = "Say it. " + "many words " * 6 + "End?"
    example = conversation(family, (question, "one two three " * 60), pictures=[picture()])
    whole = encode(example, processor)["input_ids"].shape[1]
    encoded, cut = encode_truncated(example, processor, whole // 2)
    assert cut
    assert question in tokenizer_of(processor).decode(encoded["input_ids"][0])
    assert supervised(processor, encoded).count("three") > 10


def test_a_text_begins_once(family, processor):
    """LLaVA's tokenizer puts a token in front that its template does not; Llama's template does."""
    tokenizer = tokenizer_of(processor)
    encoded = encode(conversation(family, ("2 + 2?", "4")), processor)["input_ids"][0].tolist()
    begins = ENDS[family] != "<|im_end|>"  # the Qwen tokenizers have no such token
    assert encoded.count(tokenizer.bos_token_id) == begins
    assert (encoded[0] == tokenizer.bos_token_id) == begins


def test_what_stands_between_prompt_and_answer_is_supervised(family, processor):
    """The model must say it itself: generation starts from the prompt alone."""
    if family not in ALL_TEXT:
        return
    processor.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}|Answer:{% endif %}"
        "{% endfor %}"
    )
    told = processor.chat_template.replace(
        "{{ m.content }}{%", "{{ '%' if m.role == 'assistant' }}{{ m.content }}{%"
    )
    processor.chat_template = told
    encoded = encode(conversation(family, ("2 + 2?", "4")), processor)
    assert supervised(processor, encoded) == "%4" + processor.eos_token


def test_another_length_is_encoded_anew(family, processor, tmp_path):
    long = conversation(family, ("Say " + "words " * 100, "one"), pictures=[picture()])
    lengths = [
        EncodedDataset([long], processor, tmp_path, most)[0]["input_ids"].shape[1]
        for most in (None, 90)
    ]
    assert lengths[0] > 90 >= lengths[1]
