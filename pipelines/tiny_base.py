"""What the tiny base is: its tokenizer, processor and model, how it is judged and how it is saved.

The training itself is `pretrain_tiny.py`.
"""

import copy
import json
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mm_piece.data import scenes
from mm_piece.data.scenes import lexicon
from mm_piece.data.scenes.canvas import SIZE

PAD, USER, ASSISTANT, END, IMAGE = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"
SPECIAL = (PAD, USER, ASSISTANT, END, IMAGE)
VOCABULARY = 704
PATCHES = 36
TEMPLATE = """
{%- for message in messages -%}
{%- set typed = message.content is not string -%}
{%- set text -%}
{%- if typed -%}
{%- for part in message.content if part.type == 'image' -%}<image>{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- else -%}{{ message.content }}{%- endif -%}
{%- endset -%}
{%- if message.role == 'assistant' -%}
<|assistant|>{% generation %}{{ text }}<|end|>{% endgeneration %}
{%- else -%}<|user|>{{ text }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def corpus() -> list[str]:
    """Return texts of the base and of the later tasks, and every word of the lexicon."""
    asked = (turns for _, turns in islice(scenes.iter_scenes(seed=1), 3000))
    texts = [text for turns in asked for *pair, kind in turns if kind != "echo" for text in pair]
    for name in set(scenes.TASKS) - {"base"}:
        rows = scenes.make_rows(name, "train")[:300]
        texts += [row[field] for row in rows for field in ("prompt", "answer")]
    return sorted(texts) + 12 * list(lexicon.EVERYTHING)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE; a text starts with a space that decoding drops."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "image_token": IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    side = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessor(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.strip(),
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **special)
    return model


@torch.no_grad()
def answers(model, processor, rows: list[dict], size: int = 50) -> list[str]:
    """Return the model's greedy answer to each row's single question."""
    answered = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [processor.apply_chat_template(chat(r), add_generation_prompt=True) for r in part]
        images = [row["image"] for row in part]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(model.dtype)
        ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answered += processor.batch_decode(ids, skip_special_tokens=True)
    return answered


def chat(row: dict) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}
    ]


def accuracy(model, processor, split: str) -> dict[str, float]:
    """Return the exact-match accuracy on a split of the base, per kind of question and overall."""
    rows = scenes.make_rows("base", split)
    right = defaultdict(list)
    for row, answered in zip(rows, answers(model, processor, rows), strict=True):
        right[row["kind"]].append(answered.strip() == row["answer"])
        right["overall"].append(answered.strip() == row["answer"])
    return {kind: round(sum(marks) / len(marks), 3) for kind, marks in sorted(right.items())}


def save(model, processor, folder: Path) -> None:
    """Write the base in bf16, its tensors named as in the published LLaVA-1.5 files."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    processor.tokenizer.backend_tokenizer.no_padding()  # judging has padded batches
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {published(name): value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def published(name: str) -> str:
    """Return the published name: save_pretrained leaves out the tower's `vision_model`."""
    head = "vision_tower."
    known = not name.startswith(head) or name.startswith(head + "vision_model.")
    return name if known else head + "vision_model." + name.removeprefix(head)


def describe(folder: Path, ability: dict) -> None:
    """Write ability.json and the model card."""
    (folder / "ability.json").write_text(json.dumps(ability, indent=2) + "\n")
    table = "\n".join(f"| {kind} | {share:.1%} |" for kind, share in ability["test"].items())
    card = CARD.format(table=table, **ability)
    (folder / "README.md").write_text(card)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# The tiny base

A `LlavaForConditionalGeneration` of {parameters:,} parameters (CLIP tower: 48 px, patch 8, 3 layers
of 128; Llama: 4 layers of 144; vocabulary of {vocabulary} byte-level tokens), trained from nothing
on procedural pictures of one to four shapes. It is real enough for every code path and small enough
for a laptop's CPU; it knows nothing beyond its pictures.

Made by `{command}` (seed {seed}, {seconds:,} s on one CPU thread).
Weights are bf16; tensors have the names of the published LLaVA-1.5 files. Exact match on {n}
held-out questions, a quarter of them in wordings never trained on:

| question | right |
|---|---|
{table}
"""
