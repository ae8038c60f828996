"""The answer in what a model said, and what of an example its template leaves out."""

from typing import Any

from mm_piece.data.chat_template import tokenizer_of
from mm_piece.data.example import Example, Message
from mm_piece.data.prompts import MARKER, SHORT, THOUGHTFUL, conversation, prompt
from mm_piece.data.special_tokens import last_special, specials
from mm_piece.data.thoughts import (
    CLOSE,
    THOUGHT_FIELDS,
    is_tagged,
    squeezed,
    thought_asked,
    thoughts_of,
)


def around(processor: Any, thoughtful: bool = False) -> tuple[str, str]:
    """What the template writes around an answer: between prompt and answer, after any thoughts, and
    between answer and the token that ends it."""
    shown = conversation(THOUGHTFUL if thoughtful else SHORT, processor)
    start, end = shown.answer
    before = shown.text[shown.asked : start].rpartition(MARKER)[2]
    after = shown.text[end : shown.runs[-1][1]]
    return before, after.removesuffix(last_special(after, tokenizer_of(processor)))


def question_of(messages: list[Message], processor: Any) -> str:
    """The text that asks for an answer to some messages, up to where the answer itself begins.

    Raises DataError for messages that the template refuses.
    """
    told, _ = around(processor)
    asked = prompt(Example(0, [*messages, SHORT.messages[-1]], [], "question"), processor)
    return asked + told if told.strip() else asked  # a blank begins the answer's own first token


def answer_in(said: str, example: Example, processor: Any) -> str:
    """The answer in what a model said to an example, in the form of the example's own answer.

    What the template writes around answers is no part of them; tags of thoughts that an answer has
    and its prompt holds already are.
    """
    answer = example.messages[-1]
    is_apart = not is_tagged(answer) and bool(thoughts_of(answer)[0])
    told, after = map(str.strip, around(processor, is_apart))
    said = said.rstrip().removesuffix(after)
    if is_tagged(answer):
        return thought_asked(prompt(example, processor)) + said
    place = said.find(told) if told else -1
    # Anywhere after thoughts; a mere word or sign only where it must stand.
    is_mark = CLOSE in told or any(t in told for t in specials(tokenizer_of(processor)))
    if place < 0 or (place > 0 and said[:place].strip() and not is_mark):
        return said
    return said[place + len(told) :]


def left_out(example: Example, processor: Any) -> set[str]:
    """What of an example's texts the template leaves out: thoughts, a role's messages."""
    written = squeezed(conversation(example, processor).text)
    return {
        name
        for message in example.messages
        for name, text in _named_texts(message)
        if squeezed(text) not in written
    }


def _named_texts(message: Message) -> list[tuple[str, str]]:
    """The texts of a message, and what each is called."""
    if message["role"] == "assistant":
        fields = {name: message[name] for name in THOUGHT_FIELDS if message.get(name)}
        named = [(f"{name!r} of turns", text) for name, text in fields.items()]
        thoughts, said = thoughts_of(message)
        return [*(named or [("thoughts in answers", thoughts)]), ("answers", said)]
    name = f"{message['role']} messages"
    return [(name, part["text"]) for part in message["content"] if part["type"] == "text"]
