"""A conversation as text: what asks for each answer, and what the model is to say to it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from os.path import commonprefix
from typing import Any, NamedTuple

from mm_piece.data.chat_template import render, template_of, tokenizer_of
from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.special_tokens import closers, last_special, special_at
from mm_piece.data.thoughts import (
    CLOSE,
    OPEN,
    squeezed,
    thought_asked,
    thoughts_of,
    with_thoughts_apart,
)
from mm_piece.errors import DataError, ModelError

MARKER = "\ue000"  # a private-use character: no answer begins or ends with it
Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """A conversation as text, in characters: its prompt, and what is said to each question."""

    text: str
    asked: int  # where the prompt for the last answer ends, and what the model says begins
    answer: Span  # the last answer itself, in what the model says
    runs: list[Span]  # for each answer what the model says, with the token that ends it


class Ending(NamedTuple):
    """How a template ends an answer."""

    tokens: int  # special tokens that it writes after an answer, blanks before them aside
    next: str  # else: the special token that stands there when another turn follows
    added: str  # else: the token that every answer is given


def message_of(role: str, text: str, **fields: str) -> Message:
    """A message of text alone."""
    return {"role": role, "content": [{"type": "text", "text": text}], **fields}


SHORT = Example(0, [message_of("user", "?"), message_of("assistant", "!")], [], "template")
_TWO = replace(SHORT, messages=SHORT.messages * 2)
THOUGHTFUL = replace(
    SHORT,
    messages=[message_of("user", "?"), message_of("assistant", "!", reasoning_content=MARKER)],
)


def prompt(example: Example, processor: Any) -> str:
    """The text up to the last answer, ready for generation."""
    messages, thinking = _asked(example, processor, _ending(example, processor))
    return render(example, messages[:-1], processor, generation=True, thinking=thinking)


def conversation(example: Example, processor: Any) -> Conversation:
    """The whole text; the prompt for the last answer begins it.

    An answer stands where the text changes when the answer does: so its place is right whatever the
    template adds, strips or leaves out. A template that ends no turn (LLaVA-1.5's) would teach a
    model never to stop: each answer then ends in the tokenizer's own end token.
    """
    ending = _ending(example, processor)
    messages, thinking = _asked(example, processor, ending)
    text = render(example, messages, processor, thinking=thinking)
    turns = answers(example)
    spans = [_span(example, messages, processor, turn, text, thinking) for turn in turns]
    prompts = [
        render(example, messages[:turn], processor, generation=True, thinking=thinking)
        for turn in turns
    ]
    if not text.startswith(prompts[-1]):
        history = render(example, messages[:-1], processor, thinking=thinking)
        text, spans[-1] = _joined(example, messages[-1], history, prompts[-1], text, spans[-1])
    if not ending.tokens:
        text = text[: spans[-1][1]] + ending.next
    runs = []
    for asked, (start, end) in zip(prompts, spans, strict=True):
        start = len(asked) if text.startswith(asked) else start
        runs.append((start, _ended(text, end, ending, processor)))
    return Conversation(text, len(prompts[-1]), spans[-1], runs)


def turn_end(processor: Any) -> str:
    """The special token that ends an answer in the base's template: what a model learns to say."""
    shown = conversation(SHORT, processor)
    return last_special(shown.text[: shown.runs[-1][1]], tokenizer_of(processor))


def turn_ends(processor: Any) -> set[str]:
    """The special tokens that end an answer, the last one or an earlier one, and nothing else.

    What ends an earlier answer may also stand between thoughts and answer (gpt-oss's): such a token
    ends none.
    """
    tokenizer = tokenizer_of(processor)
    two = conversation(_TWO, processor)
    earlier = last_special(two.text[slice(*two.runs[0])], tokenizer)
    last = turn_end(processor)
    thought = conversation(THOUGHTFUL, processor)
    inside = thought.text[thought.asked : thought.answer[0]]
    return {last, earlier if earlier not in inside else last} - {""}


def answers(example: Example) -> list[int]:
    """The positions of the answers among an example's messages."""
    return [n for n, message in enumerate(example.messages) if message["role"] == "assistant"]


def _asked(example: Example, processor: Any, ending: Ending) -> tuple[list[Message], bool]:
    """The messages as the template gets them, and whether it asks for thoughts before an answer.

    A model that can think is asked to answer at once, unless the answer has thoughts. Templates
    read those in the answer's text or in a field of their own: in whichever form they come out.
    """
    messages = [_with_end(message, ending.added) for message in example.messages]
    if not thoughts_of(messages[-1])[0]:
        return messages, False
    for given in (messages, [*messages[:-1], with_thoughts_apart(messages[-1])]):
        if _fits(example, given, processor):
            return given, True
    asked = render(example, messages[:-1], processor, generation=True, thinking=True)
    return messages, bool(thought_asked(asked))


def _fits(example: Example, messages: list[Message], processor: Any) -> bool:
    """Whether thoughts and answer come out after the prompt, and no empty thoughts before them."""
    text = render(example, messages, processor, thinking=True)
    asked = render(example, messages[:-1], processor, generation=True, thinking=True)
    if not text.startswith(asked):
        return False
    thoughts, said = thoughts_of(messages[-1])
    told = text[len(asked) :]
    closed = told.count(CLOSE) + (CLOSE in thought_asked(asked))
    shown = all(squeezed(piece) in squeezed(told) for piece in (thoughts, said))
    return shown and closed <= 1 + said.count(CLOSE)


def _with_end(message: Message, end: str) -> Message:
    if not end or message["role"] != "assistant":
        return message
    return {**message, "content": [{"type": "text", "text": text_of(message) + end}]}


def _ending(example: Example, processor: Any) -> Ending:
    """How the template ends an answer; the error for a template that refuses names the example."""
    try:
        eos = tokenizer_of(processor).eos_token
        return _ending_of(processor, template_of(processor), tuple(closers(processor)), eos)
    except DataError:
        render(example, example.messages, processor)
        raise


@lru_cache(maxsize=64)
def _ending_of(processor: Any, template: str, known: tuple[str, ...], eos: str | None) -> Ending:
    """How the template ends an answer, found on a short one; `known` are tokens that may."""
    question, answer = SHORT.messages
    text = render(SHORT, SHORT.messages, processor)
    end = _span(SHORT, SHORT.messages, processor, 1, text, False)[1]
    if tokens := _count(text[end:], known):
        return Ending(tokens, "", "")
    try:
        text = render(SHORT, [question, answer, question], processor)
    except DataError:
        text = text[:end]
    if found := special_at(text[end:], known):
        return Ending(0, found, "")
    if not eos:
        raise ModelError(
            "the base's chat template ends no answer and its tokenizer has no end token; "
            "give the tokenizer an eos_token"
        )
    return Ending(0, "", eos)


def _joined(
    example: Example, answer: Message, history: str, asked: str, text: str, span: Span
) -> tuple[str, Span]:
    """The text with its last answer after the prompt that asks for it, and the answer's place.

    The template writes the two otherwise (LLaVA-OneVision's: a blank before the line break), or
    prompts begin thoughts that answers have lost (DeepSeek's). What is trained is what is asked.
    """
    if not (text.startswith(history) and asked.startswith(history)):
        raise ModelError(
            f"{example.source} row {example.row}: the chat template's prompt is not a prefix of "
            "prompt + answer; give the base another chat template (chat_template.jinja)"
        )
    start, end = span
    thoughts, said, tags = "", text[start:end], thought_asked(asked)
    if OPEN in tags:
        thoughts, said = thoughts_of(answer)
        said = said.strip()
        thoughts = "" if CLOSE in tags else f"{thoughts.strip()}\n{CLOSE}\n\n"
    begun = asked + thoughts
    return begun + said + text[end:], (len(begun), len(begun + said))


def _span(
    example: Example,
    messages: list[Message],
    processor: Any,
    turn: int,
    text: str,
    thinking: bool,
) -> Span:
    """Where in the text an answer stands: what changes when it does."""
    others = list(messages)
    others[turn] = {**messages[turn], "content": [{"type": "text", "text": MARKER}]}
    marked = render(example, others, processor, thinking=thinking)
    start = len(commonprefix([text, marked]))
    return start, len(text) - len(commonprefix([text[::-1], marked[::-1]]))


def _ended(text: str, end: int, ending: Ending, processor: Any) -> int:
    """The character after the tokens that end an answer."""
    if ending.added:
        return end
    known = closers(processor)
    tail = text[end:].lstrip() if ending.tokens else text[end:]
    for _ in range(ending.tokens or 1):
        if token := special_at(tail, known):
            tail = tail[len(token) :]
            end = len(text) - len(tail)
    return end


def _count(tail: str, known: Iterable[str]) -> int:
    """How many special tokens a text begins with, one after another, blanks before them aside."""
    number, tail = 0, tail.lstrip()
    while token := special_at(tail, known):
        number += 1
        tail = tail[len(token) :]
    return number
