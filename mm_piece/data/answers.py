"""The answer in a generated text, and the texts of an example that the chat template omits."""

from mm_piece.data.example import Example, Message
from mm_piece.data.processor import Processor, tokenizer_of
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


def find_answer_affixes(processor: Processor, thoughtful: bool = False) -> tuple[str, str]:
    """Return what the template writes right before and right after an answer.

    The first stands between the prompt, or any thoughts, and the answer; the second between the
    answer and the token that ends it.
    """
    example = THOUGHTFUL_EXAMPLE if thoughtful else SHORT_EXAMPLE
    rendered = render_conversation(example, processor)
    start, end = rendered.answer_span
    _, stop = rendered.supervised_spans[-1]

    before = rendered.text[rendered.prompt_end : start]
    # the marker is the thoughtful example's thoughts
    prefix = before.rpartition(MARKER)[2]

    after = rendered.text[end:stop]
    end_token = find_trailing_token(after, tokenizer_of(processor))
    return prefix, after.removesuffix(end_token)


def render_question(messages: list[Message], processor: Processor) -> str:
    """Return the text that asks for an answer to some messages, up to the answer itself.

    Raises DataError for messages that the template refuses.
    """
    answer_prefix, _ = find_answer_affixes(processor)
    # templates are made for whole conversations: some answer stands at the end
    placeholder = SHORT_EXAMPLE.messages[-1]
    example = Example(
        row=0,
        messages=[*messages, placeholder],
        images=[],
        source="question",
    )
    prompt_text = render_prompt(example, processor)
    if not answer_prefix.strip():  # whitespace begins the answer's own first token
        return prompt_text
    return prompt_text + answer_prefix


def extract_answer(generated_text: str, example: Example, processor: Processor) -> str:
    """Return the answer in a generated text, in the form of the example's own answer.

    The affixes of the template are left out; tags of thoughts are added if the example's answer has
    some that its prompt has written already.
    """
    answer = example.messages[-1]
    has_tags = has_tagged_thoughts(answer)
    thoughts, _ = split_thoughts(answer)
    has_thought_field = bool(thoughts) and not has_tags

    affixes = find_answer_affixes(processor, has_thought_field)
    prefix, suffix = map(str.strip, affixes)
    text = generated_text.rstrip().removesuffix(suffix)
    if has_tags:
        prompt = render_prompt(example, processor)
        return find_trailing_tags(prompt) + text

    if not prefix or prefix not in text:
        return text
    before, _, after = text.partition(prefix)
    # tags and special tokens mark the answer wherever they stand, after thoughts too; a mere word
    # or sign does so at the beginning alone
    if before.strip() and not _is_mark(prefix, processor):
        return text
    return after


def find_omitted_texts(example: Example, processor: Processor) -> set[str]:
    """Return the names of the texts of an example that the template leaves out.

    They may be the thoughts, or all messages of a role.
    """
    rendered = render_conversation(example, processor)
    written = remove_whitespace(rendered.text)
    omitted = set()
    for message in example.messages:
        for name, text in _list_named_texts(message):
            if remove_whitespace(text) not in written:
                omitted.add(name)
    return omitted


def _is_mark(prefix: str, processor: Processor) -> bool:
    """Return whether a prefix has a tag or a special token, which no answer has by chance."""
    if CLOSE_TAG in prefix:
        return True
    tokens = list_special_tokens(tokenizer_of(processor))
    return any(token in prefix for token in tokens)


def _list_named_texts(message: Message) -> list[tuple[str, str]]:
    """Return the texts of a message, each after its name in a message to the user."""
    role = message["role"]
    named = []
    if role != "assistant":
        for content_part in message["content"]:
            if content_part["type"] == "text":
                named.append((f"{role} messages", content_part["text"]))
        return named

    for field in THOUGHT_FIELDS:
        if message.get(field):
            named.append((f"{field!r} of turns", message[field]))
    thoughts, answer_text = split_thoughts(message)
    if not named:
        named.append(("thoughts in answers", thoughts))
    named.append(("answers", answer_text))
    return named
