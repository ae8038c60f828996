"""A tiny language model as a GGUF file, quantised."""

import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, WIDE, LAYERS = 32, 64, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NORMAL, _CONTROL = 1, 3  # llama.cpp's kinds of tokens


def make_weights():
    """The weights under GGUF's names, before they are quantised."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(make_vocabulary()), HIDDEN)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}.weight"] = (HIDDEN, HIDDEN)
        shapes[f"blk.{layer}.ffn_gate.weight"] = (WIDE, HIDDEN)
        shapes[f"blk.{layer}.ffn_up.weight"] = (WIDE, HIDDEN)
        shapes[f"blk.{layer}.ffn_down.weight"] = (HIDDEN, WIDE)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_vocabulary():
    """The byte-level alphabet, and two digits that pieces of text may be merged to."""
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]


def write_gguf(file, architecture="llama"):
    """Write the model with Q4_1 weights; return the file."""
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(make_vocabulary()))

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(make_vocabulary())
    kinds = [_CONTROL if token in SPECIAL else _NORMAL for token in make_vocabulary()]
    writer.add_token_types(kinds)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)

    kind = gguf.GGMLQuantizationType.Q4_1
    for name, weight in make_weights().items():
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def dequantised(name):
    """The values that a weight of the file stands for."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_1
    return gguf.quants.dequantize(gguf.quants.quantize(make_weights()[name], kind), kind)
