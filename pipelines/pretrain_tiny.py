"""Train the tiny base: a real LLaVA of 1.8 million parameters, from nothing, on procedural pictures.

Run:    python pipelines/pretrain_tiny.py                    (about an hour on one CPU core)
        python pipelines/pretrain_tiny.py --steps 600        (a rough base in a few minutes)
Needs:  the library, 2 GB of memory; no network, no GPU.
Expect: checkpoints/tiny/base with model, processor, model card and ability.json.

Three steps: a byte-level BPE tokenizer learns the vocabulary; the vision tower learns to name what stands
in each cell of the page; then everything learns to answer. Several questions about one picture share one
sequence, and a block mask keeps them from seeing each other, so each is trained exactly as it is asked
later: alone. In every fourth sequence the questions are real turns of one conversation instead.
"""

import json
import logging
import math
import random
import shutil
import sys
import time
from collections import defaultdict
from functools import lru_cache
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mm_piece import scenes
from mm_piece.scenes import base as world
from mm_piece.scenes import lexicon

PAD, USER, ASSISTANT, END, IMAGE = SPECIAL = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"
VOCABULARY = 704
PATCHES = 36
BATCH = 32
LENGTH = 160  # tokens of one training sequence: the picture and about eight questions
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
log = logging.getLogger("pretrain_tiny")


# --- tokenizer, processor, model -------------------------------------------------------------------


def corpus() -> list[str]:
    """Return texts of the base and of the later tasks, and every word of the lexicon."""
    asked = (turns for _, turns in islice(scenes.stream(seed=1), 3000))
    texts = [text for turns in asked for *pair, kind in turns if kind != "echo" for text in pair]
    for name in set(scenes.TASKS) - {"base"}:
        rows = scenes.rows(name, "train")[:300]
        texts += [row[field] for row in rows for field in ("prompt", "answer")]
    return sorted(texts) + 12 * list(lexicon.EVERYTHING)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE: every string has tokens, each text starts with a (dropped) space."""
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
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    side = {"height": world.SIZE, "width": world.SIZE}
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
        image_size=world.SIZE,
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


# --- batches ---------------------------------------------------------------------------------------


class Packer:
    """Scenes and their questions → tensors of one fixed shape."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.scenes = scenes.stream(seed, count=9)
        self.rng = random.Random(seed)
        self.encode = lru_cache(100_000)(lambda text: tokenizer.encode(text))
        self.pad, self.user, self.assistant, self.end, self.image = (
            tokenizer.convert_tokens_to_ids(list(SPECIAL))
        )

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        drawn = list(islice(self.scenes, size))
        packed = [self._pack(turns, self.rng.random() < 0.25) for _, turns in drawn]
        ids, targets, places, blocks = torch.tensor(packed).unbind(1)
        return {
            "pixels": pixels([scene for scene, _ in drawn]),
            "cells": torch.tensor([cells(scene) for scene, _ in drawn]),
            "ids": ids,
            "targets": targets,
            "places": places,
            "allowed": allowed(blocks),
        }

    def _pack(self, turns, chained: bool) -> list[list[int]]:
        """Return rows of ids, targets, positions and blocks; block 0 is seen by every other."""
        head = [self.user] + [self.image] * PATCHES
        ids, targets = list(head), [-100] * len(head)
        places, blocks = list(range(len(head))), [0] * len(head)
        for number, (prompt, answer, _) in enumerate(turns):
            lead = [self.user] if chained and number else []
            question = [*lead, *self.encode(prompt), self.assistant]
            reply = [*self.encode(answer), self.end]
            length = len(question) + len(reply)
            if len(ids) + length > LENGTH:
                continue
            start = len(ids) if chained else len(head)
            ids += question + reply
            targets += [-100] * (len(question) - 1) + reply + [-100]
            places += range(start, start + length)
            blocks += [0 if chained else number + 1] * length
        gap = LENGTH - len(ids)
        return [ids + [self.pad] * gap, targets + [-100] * gap, places + [0] * gap, blocks + [-1] * gap]


def allowed(blocks: torch.Tensor) -> torch.Tensor:
    """Return the attention bias: a token looks backwards, at its own block and at block 0."""
    same = blocks[:, :, None] == blocks[:, None, :]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen = ((same | (blocks[:, None, :] == 0)) & causal)[:, None]
    return torch.zeros(seen.shape).masked_fill(~seen, -1e4)


def pixels(drawn) -> torch.Tensor:
    stack = np.stack([np.asarray(scene.image) for scene in drawn])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


ATTRIBUTES = tuple(world.SIZES), tuple(world.COLOURS), world.SHAPES, tuple(world.SIGNS)


def cells(scene) -> list[list[int]]:
    """Return for each of the nine cells the number of its size, colour, shape and sign; 0 is none."""
    page = [[0] * len(ATTRIBUTES) for _ in range(9)]
    for thing in scene.things:
        values = thing.size, thing.colour, thing.shape
        page[thing.cell][:3] = [names.index(v) + 1 for names, v in zip(ATTRIBUTES, values)]
    if scene.sign:
        page[scene.sign[1]][3] = ATTRIBUTES[3].index(scene.sign[0]) + 1
    return page


# --- training --------------------------------------------------------------------------------------


class Lessons(nn.Module):
    """The two losses: naming what stands in each cell, and answering."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.model, self.counts = model, [len(names) + 1 for names in ATTRIBUTES]
        self.namer = nn.Linear(4 * model.config.vision_config.hidden_size, sum(self.counts))

    def see(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.model.vision_tower(pixel_values=images).last_hidden_state[:, 1:]

    def name_cells(self, features: torch.Tensor) -> torch.Tensor:
        grid = features.unflatten(1, (3, 2, 3, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)
        return self.namer(grid.flatten(1, 2))

    def naming_loss(self, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        parts = logits.float().flatten(0, 1).split(self.counts, -1)
        losses = [F.cross_entropy(part, row) for part, row in zip(parts, truth.flatten(0, 1).T)]
        return torch.stack(losses).sum()

    def read(self, features, batch) -> torch.Tensor:
        """Return the language model's hidden states over the packed sequence."""
        inner = self.model.model
        words = inner.language_model.embed_tokens(batch["ids"])
        seen = inner.multi_modal_projector(features).to(words.dtype)
        mixed = torch.cat([words[:, :1], seen, words[:, 1 + PATCHES :]], dim=1)
        return inner.language_model(
            inputs_embeds=mixed,
            attention_mask=batch["allowed"],
            position_ids=batch["places"],
            use_cache=False,
        ).last_hidden_state

    def answering_loss(self, hidden, targets) -> torch.Tensor:
        chosen = targets >= 0
        return F.cross_entropy(self.model.lm_head(hidden[chosen]).float(), targets[chosen])

    def forward(self, batch: dict, answer: bool) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.see(batch["pixels"])
        naming = self.naming_loss(self.name_cells(features), batch["cells"])
        if not answer:
            return naming, torch.zeros(())
        return naming, self.answering_loss(self.read(features, batch), batch["targets"])


def fit(lessons: Lessons, packer: Packer, steps: int, rate: float, answer: bool, after=None) -> None:
    """Run AdamW with warm-up and cosine decay; `after(step)` is called after each step."""
    decayed = [w for w in lessons.parameters() if w.ndim > 1]
    plain = [w for w in lessons.parameters() if w.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    told = Teller("answers" if answer else "cells", steps)
    for step in range(1, steps + 1):
        batch = packer.batch(BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            naming, answering = lessons(batch, answer)
        loss = answering + 0.05 * naming if answer else naming
        loss.backward()
        nn.utils.clip_grad_norm_(lessons.parameters(), 1.0)
        optimizer.step()
        shape.step()
        optimizer.zero_grad()
        told.tell(step, naming.item(), answering.item(), shape.get_last_lr()[0])
        if after:
            after(step)


def pace(step: int, steps: int) -> float:
    """Return the share of the full rate: a short climb, then half a cosine down to a hundredth."""
    climb = min(300, steps // 10)
    if step < climb:
        return (step + 1) / climb
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - climb) / max(1, steps - climb)))


class Teller:
    """Log a line of progress every fifteen seconds."""

    def __init__(self, title: str, steps: int):
        self.title, self.steps = title, steps
        self.begun = self.last = time.monotonic()
        self.sums = [0.0, 0.0, 0]

    def tell(self, step: int, naming: float, answering: float, rate: float) -> None:
        self.sums = [self.sums[0] + naming, self.sums[1] + answering, self.sums[2] + 1]
        now = time.monotonic()
        if now - self.last < 15 and step < self.steps:
            return
        seen, said, count = self.sums
        speed = step / (now - self.begun)
        log.info(
            f"{self.title} {step}/{self.steps}  naming {seen / count:.3f}  answering {said / count:.3f}"
            f"  rate {rate:.1e}  {speed:.2f} steps/s  {(self.steps - step) / speed / 60:.0f} min left"
        )
        self.last, self.sums = now, [0.0, 0.0, 0]


# --- judging and saving ----------------------------------------------------------------------------


@torch.no_grad()
def answers(model, processor, rows: list[dict], size: int = 50) -> list[str]:
    """Return the model's greedy answer to each row's single question."""
    said = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [processor.apply_chat_template(chat(r), add_generation_prompt=True) for r in part]
        images = [row["image"] for row in part]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(model.dtype)
        ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(ids, skip_special_tokens=True)
    return said


def chat(row: dict) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}]


def accuracy(model, processor, split: str) -> dict[str, float]:
    """Return the exact-match accuracy on a split of the base, per kind of question and overall."""
    rows = scenes.rows("base", split)
    right = defaultdict(list)
    for row, said in zip(rows, answers(model, processor, rows), strict=True):
        right[row["kind"]].append(said.strip() == row["answer"])
        right["overall"].append(said.strip() == row["answer"])
    return {kind: round(sum(marks) / len(marks), 3) for kind, marks in sorted(right.items())}


def save(model, processor, folder: Path) -> None:
    """Write the base in bf16, its tensors named as in the published LLaVA-1.5 files."""
    dtype = model.dtype
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {published(name): value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert model.dtype == dtype


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

A `LlavaForConditionalGeneration` of {parameters:,} parameters (CLIP tower: 48 px, patch 8, 3 layers of 128;
Llama: 4 layers of 144; vocabulary of {vocabulary} byte-level tokens), trained from nothing on procedural
pictures of one to four shapes. It is real enough for every code path and small enough for a laptop's CPU;
it knows nothing beyond its pictures.

Made by `{command}` (seed {seed}, {seconds:.0f} s on one CPU thread). Weights are bf16; tensors have the
names of the published LLaVA-1.5 files. Exact match on {n} held-out questions, a quarter of them worded as
never in training:

| question | right |
|---|---|
{table}
"""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="checkpoints/tiny/base")
@click.option("--steps", default=12000, show_default=True, help="Steps of the answering stage.")
@click.option("--tower-steps", default=1500, show_default=True, help="Steps of the tower's stage.")
@click.option("--rate", default=2e-3, show_default=True, help="Highest learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--check-every", default=1000, show_default=True, help="Steps between checkpoints.")
def main(out: Path, steps: int, tower_steps: int, rate: float, seed: int, check_every: int) -> None:
    """Train the tiny base; OUT is replaced only when the training has finished."""
    begun = time.monotonic()
    torch.manual_seed(seed)
    work = out.with_name(out.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    start_log(work / "train.log")
    processor = build_processor()
    model = build_model(processor.tokenizer)
    lessons, packer = Lessons(model), Packer(processor.tokenizer, seed)
    model.set_attn_implementation("eager")  # on a CPU its backward pass is the fastest
    best = 0.0

    def check(step: int) -> None:
        nonlocal best
        if step % check_every and step < steps:
            return
        found = accuracy(model, processor, "validation")
        log.info(f"validation at {step}: {found}")
        if found["overall"] >= best:
            best = found["overall"]
            save(model, processor, work)

    fit(lessons, packer, tower_steps, rate, answer=False)
    fit(lessons, packer, steps, rate, answer=True, after=check)
    finish(work, out, seed, time.monotonic() - begun)


def finish(work: Path, out: Path, seed: int, seconds: float) -> None:
    """Judge the best checkpoint on the test split, describe it and put it in its place."""
    processor = AutoProcessor.from_pretrained(work)
    model = LlavaForConditionalGeneration.from_pretrained(work)
    ability = {
        "test": accuracy(model, processor, "test"),
        "n": scenes.SPLITS["test"],
        "seed": seed,
        "command": " ".join(["python", "pipelines/pretrain_tiny.py", *sys.argv[1:]]),
        "seconds": round(seconds),
        "parameters": model.num_parameters(),
        "vocabulary": len(processor.tokenizer),
    }
    log.info(f"test: {ability['test']}")
    describe(work, ability)
    (work / "train.log").unlink()
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)


def start_log(file: Path) -> None:
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(), logging.FileHandler(file, mode="w")],
        force=True,
    )


if __name__ == "__main__":
    main()
