"""The answer in what a model said, and what of an example its template leaves out."""

from typing import Any

from mm_piece.data.chat_template import tokenizer_of
from mm_piece.data.example import Example, Message
from mm_piece.data.prompts import (
    MARKER,
    SHORT_EXAMPLE,
    THOUGHTFUL_EXAMPLE,
    render_conversation,
    render_prompt,
)
from mm_piece.data.special_tokens import find_trailing_token, list_special_tokens
from mm_piece.data.thoughts import (
    CLOSE_TAG,
    THOUGHT_FIELDS,
    find_trailing_tags,
    has_tagged_thoughts,
    remove_whitespace,
    split_thoughts,
)


def find_answer_affixes(processor: Any, thoughtful: bool = False) -> tuple[str, str]:
    """What the template writes around an answer: between prompt and answer, after any thoughts, and
    between answer and the token that ends it."""
    rendered = render_conversation(THOUGHTFUL_EXAMPLE if thoughtful else SHORT_EXAMPLE, processor)
    start, end = rendered.answer_span
    before = rendered.text[rendered.prompt_end : start].rpartition(MARKER)[2]
    after = rendered.text[end : rendered.supervised_spans[-1][1]]
    return before, after.removesuffix(find_trailing_token(after, tokenizer_of(processor)))


def render_question(messages: list[Message], processor: Any) -> str:
    """The text that asks for an answer to some messages, up to where the answer itself begins.

    Raises DataError for messages that the template refuses.
    """
    answer_prefix, _ = find_answer_affixes(processor)
    prompt_text = render_prompt(
        Example(0, [*messages, SHORT_EXAMPLE.messages[-1]], [], "question"), processor
    )
    return (
        prompt_text + answer_prefix if answer_prefix.strip() else prompt_text
    )  # a blank begins the answer's own first token


def extract_answer(generated_text: str, example: Example, processor: Any) -> str:
    """The answer in what a model said to an example, in the form of the example's own answer.

    What the template writes around answers is no part of them; tags of thoughts that an answer has
    and its prompt holds already are.
    """
    answer = example.messages[-1]
    has_thought_field = not has_tagged_thoughts(answer) and bool(split_thoughts(answer)[0])
    answer_prefix, answer_suffix = map(str.strip, find_answer_affixes(processor, has_thought_field))
    generated_text = generated_text.rstrip().removesuffix(answer_suffix)
    if has_tagged_thoughts(answer):
        return find_trailing_tags(render_prompt(example, processor)) + generated_text
    prefix_start = generated_text.find(answer_prefix) if answer_prefix else -1
    # Anywhere after thoughts; a mere word or sign only where it must stand.
    is_mark = CLOSE_TAG in answer_prefix or any(
        t in answer_prefix for t in list_special_tokens(tokenizer_of(processor))
    )
    if prefix_start < 0 or (
        prefix_start > 0 and generated_text[:prefix_start].strip() and not is_mark
    ):
        return generated_text
    return generated_text[prefix_start + len(answer_prefix) :]


def find_omitted_texts(example: Example, processor: Any) -> set[str]:
    """What of an example's texts the template leaves out: thoughts, a role's messages."""
    written = remove_whitespace(render_conversation(example, processor).text)
    return {
        name
        for message in example.messages
        for name, text in _list_named_texts(message)
        if remove_whitespace(text) not in written
    }


def _list_named_texts(message: Message) -> list[tuple[str, str]]:
    """The texts of a message, and what each is called."""
    if message["role"] == "assistant":
        fields = {name: message[name] for name in THOUGHT_FIELDS if message.get(name)}
        named = [(f"{name!r} of turns", text) for name, text in fields.items()]
        thoughts, answer_text = split_thoughts(message)
        return [*(named or [("thoughts in answers", thoughts)]), ("answers", answer_text)]
    name = f"{message['role']} messages"
    return [
        (name, content_part["text"])
        for content_part in message["content"]
        if content_part["type"] == "text"
    ]
