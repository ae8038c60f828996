"""A tiny real instance of every supported family: transformers' own classes, built offline.

Chat templates follow those that the families publish, end-of-turn tokens and all; the tokenizer is
trained here on a few sentences.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

_SPECIAL = {
    "llava": ["<pad>", "</s>", "<s>", "<image>"],
    "qwen": [
        *("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|video_pad|>"),
        *("<|vision_start|>", "<|vision_end|>", "<image>", "<video>"),
    ],
    "gemma": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
    "gemma3": [
        *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    ],
    "internvl": [
        *("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"),
        "<video>",
    ],
    "pixtral": ["<pad>", "</s>", "<s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    "idefics": [
        *("<|im_end|>", "<end_of_utterance>", "<|im_start|>", "<image>", "<global-img>"),
        *("<fake_token_around_image>", "<video>", "<row_1_col_1>"),
    ],
    "llama": ["<|pad|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>"],
}
_TURNS = "{% for message in messages %}"
_PARTS = "{% if message.content is string %}{{ message.content }}{% else %}{% for part in "
_CHATML_PARTS = (
    _PARTS + "message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}"
)
_CHATML = (
    _TURNS + "SYSTEM<|im_start|>{{ message.role }}\n" + _CHATML_PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_TEMPLATES = {
    # No end of turn, and a space after every text: the published LLaVA-1.5 template.
    "llava": (
        _TURNS + "{% if message.role != 'system' %}{{ message.role.upper() }}: {% endif %}"
        "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
        "{% for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "onevision": _CHATML.replace("SYSTEM", "").replace("IMAGE", "<image>\n"),
    "qwen2-vl": _CHATML.replace("SYSTEM", _DEFAULT_SYSTEM).replace("IMAGE", _QWEN_IMAGE),
    "qwen3-vl": _CHATML.replace("SYSTEM", "").replace("IMAGE", _QWEN_IMAGE),
    "qwen2": _CHATML.replace("SYSTEM", _DEFAULT_SYSTEM).replace("IMAGE", ""),
    # The last answer opens with a block of thought that earlier answers have lost.
    "qwen3": (
        _TURNS + "<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}" + _TURNS + "<|start_header_id|>{{ message.role }}\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}" + _TURNS + "<start_of_turn>"
        "{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "gemma3": (
        "{{ bos_token }}" + _TURNS + "<start_of_turn>"
        "{{ 'model' if message.role == 'assistant' else message.role }}\n"
        + _CHATML_PARTS.replace("IMAGE", "<start_of_image>")
        + "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "internvl": _CHATML.replace("SYSTEM", "").replace("IMAGE", "<IMG_CONTEXT>\n"),
    "pixtral": (
        "{{ bos_token }}"
        + _TURNS
        + "{% if message.role == 'user' %}[INST]{% endif %}"
        + _CHATML_PARTS.replace("IMAGE", "[IMG]")
        + "{% if message.role == 'user' %}[/INST]{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "idefics": (
        "<|im_start|>"
        + _TURNS
        + "{{ message.role | capitalize }}: "
        + _CHATML_PARTS.replace("IMAGE", "<image>")
        + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
_SENTENCES = (
    "What is in the picture? Answer with one word. A red box, a green ball, a dog and a cat.",
    "How many are there? one two three four five six seven eight nine ten. yes no left right",
    "USER: ASSISTANT: system user assistant model You are a helpful assistant. Which colour is it?",
)


@functools.cache
def _backend(kind: str) -> str:
    """A byte-level BPE tokenizer with merges, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=_SPECIAL[kind],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    if kind == "llava":  # a LLaVA tokenizer begins every text with <s>, its template does not
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)]
        )
    return tokenizer.to_str()


def tokenizer_for(kind: str, template: str, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind of language model, with a published chat template."""
    pad, eos, bos, *others = _SPECIAL[kind]
    without_beginning = ("qwen", "internvl")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)),
        pad_token=pad,
        eos_token=eos,
        bos_token=None if kind in without_beginning else bos,
        extra_special_tokens=[bos, *others] if kind in without_beginning else others,
        padding_side="left",
        **options,
    )
    tokenizer.chat_template = _TEMPLATES[template]
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerFast, **options: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **options,
    }


_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def expansion(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """How a LLaVA's processor expands an image of the tiny tower."""
    return {
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": tokenizer.chat_template,
    }


def llava_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor of a LLaVA with the tiny tower."""
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(images, tokenizer, **expansion(tokenizer))


def next_images() -> LlavaNextImageProcessor:
    """The tiles of a LLaVA-NeXT with the tiny tower."""
    return LlavaNextImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=PINPOINTS,
    )


def _llava() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("llava", "llava")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_CLIP),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    return config, llava_processor(tokenizer)


def _llava_next() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("llava", "llava")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_CLIP),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    return config, LlavaNextProcessor(next_images(), tokenizer, **expansion(tokenizer))


def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("qwen", "onevision")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_CLIP, vision_use_head=False),
        text_config=Qwen2Config(**_text(tokenizer, tie_word_embeddings=True)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(
            size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 16, "width": 16}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _qwen_vl(
    config: Callable[..., Any],
    processor: Callable[..., Any],
    video: Any,
    vision: dict[str, Any],
    text: dict[str, Any],
) -> tuple[Any, Any]:
    """The Qwen-VL generations: their configurations differ in names alone."""
    new = processor is Qwen3VLProcessor
    tokenizer = tokenizer_for("qwen", "qwen3-vl" if new else "qwen2-vl")
    size, patch = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, 16 if new else 8
    made = config(
        text_config=_text(tokenizer, rope_parameters=_MROPE, **text),
        vision_config={"patch_size": patch, "spatial_merge_size": 2, "in_channels": 3, **vision},
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        **_qwen_ids(tokenizer),
    )
    images = Qwen2VLImageProcessor(size=size, patch_size=patch, merge_size=2)
    videos = video(size=size, patch_size=patch, merge_size=2)
    return made, processor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def _qwen2_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    return _qwen_vl(
        Qwen2VLConfig,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        vision,
        {"tie_word_embeddings": True},
    )


def _qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        **{"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2},
        **{"intermediate_size": 24, "window_size": 32, "fullatt_block_indexes": [1]},
    }
    return _qwen_vl(Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, vision, {})


_QWEN3_VISION = {
    **{"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2},
    **{"intermediate_size": 24, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}


def _qwen3_vl() -> tuple[Any, Any]:
    text = {"head_dim": 8, "tie_word_embeddings": True}
    return _qwen_vl(Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor, _QWEN3_VISION, text)


def _qwen3_vl_moe() -> tuple[Any, Any]:
    text = {
        **{"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": []},
    }
    return _qwen_vl(Qwen3VLMoeConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor, _QWEN3_VISION, text)


def _llama() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("llama", "llama")
    return LlamaConfig(**_text(tokenizer)), tokenizer


def _mistral() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("llama", "llama")
    return MistralConfig(**_text(tokenizer, sliding_window=None)), tokenizer


def _gemma2() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("gemma", "gemma")
    return Gemma2Config(**_text(tokenizer, head_dim=8, sliding_window=8)), tokenizer


def _qwen2() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("qwen", "qwen2")
    return Qwen2Config(**_text(tokenizer, tie_word_embeddings=True)), tokenizer


def _qwen3() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("qwen", "qwen3")
    return Qwen3Config(**_text(tokenizer, head_dim=8)), tokenizer


TEXT = ("llama", "mistral", "gemma2", "qwen2", "qwen3")  # families without a vision tower


def make(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny checkpoint of a family with its processor, as transformers saves it."""
    return save_tiny(*BUILDERS[family](), folder, seed)


def save_tiny(config: Any, processor: Any, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint with random weights of a configuration, and a processor."""
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config)
    for parameter in model.parameters():  # fresh norms and biases are all equal: tell them apart
        torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "llama": _llama,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
