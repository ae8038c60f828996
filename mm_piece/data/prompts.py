"""A conversation as text: what asks for each answer, and what the model is to say to it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from os.path import commonprefix
from typing import Any, NamedTuple

from mm_piece.data.chat_template import render_messages, template_of, tokenizer_of
from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.special_tokens import find_leading_token, find_trailing_token, list_end_tokens
from mm_piece.data.thoughts import (
    CLOSE_TAG,
    OPEN_TAG,
    find_trailing_tags,
    move_thoughts_to_field,
    remove_whitespace,
    split_thoughts,
)
from mm_piece.errors import DataError, ModelError

MARKER = "\ue000"  # a private-use character: no answer begins or ends with it
Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text, in characters: its prompt, and what is said to each question."""

    text: str
    prompt_end: int  # where the prompt for the last answer ends, and what the model says begins
    answer_span: Span  # the last answer itself, in what the model says
    supervised_spans: list[Span]  # for each answer what the model says, with the token that ends it


class AnswerEnding(NamedTuple):
    """How a template ends an answer."""

    num_tokens: int  # special tokens that it writes after an answer, blanks before them aside
    next_token: str  # else: the special token that stands there when another turn follows
    added_token: str  # else: the token that every answer is given


def make_message(role: str, text: str, **fields: str) -> Message:
    """A message of text alone."""
    return {"role": role, "content": [{"type": "text", "text": text}], **fields}


SHORT_EXAMPLE = Example(
    0, [make_message("user", "?"), make_message("assistant", "!")], [], "template"
)
_TWO_TURN_EXAMPLE = replace(SHORT_EXAMPLE, messages=SHORT_EXAMPLE.messages * 2)
THOUGHTFUL_EXAMPLE = replace(
    SHORT_EXAMPLE,
    messages=[make_message("user", "?"), make_message("assistant", "!", reasoning_content=MARKER)],
)


def render_prompt(example: Example, processor: Any) -> str:
    """The text up to the last answer, ready for generation."""
    messages, thinking = _prepare_messages(example, processor, _find_ending(example, processor))
    return render_messages(example, messages[:-1], processor, generation=True, thinking=thinking)


def render_conversation(example: Example, processor: Any) -> RenderedConversation:
    """The whole text; the prompt for the last answer begins it.

    An answer stands where the text changes when the answer does: so its place is right whatever the
    template adds, strips or leaves out. A template that ends no turn (LLaVA-1.5's) would teach a
    model never to stop: each answer then ends in the tokenizer's own end token.
    """
    ending = _find_ending(example, processor)
    messages, thinking = _prepare_messages(example, processor, ending)
    text = render_messages(example, messages, processor, thinking=thinking)
    turns = find_answer_positions(example)
    spans = [
        _find_answer_span(example, messages, processor, turn, text, thinking) for turn in turns
    ]
    prompts = [
        render_messages(example, messages[:turn], processor, generation=True, thinking=thinking)
        for turn in turns
    ]
    if not text.startswith(prompts[-1]):
        history = render_messages(example, messages[:-1], processor, thinking=thinking)
        text, spans[-1] = _join_prompt_answer(
            example, messages[-1], history, prompts[-1], text, spans[-1]
        )
    if not ending.num_tokens:
        text = text[: spans[-1][1]] + ending.next_token
    supervised_spans = []
    for prompt_text, (start, end) in zip(prompts, spans, strict=True):
        start = len(prompt_text) if text.startswith(prompt_text) else start
        supervised_spans.append((start, _find_ending_stop(text, end, ending, processor)))
    return RenderedConversation(text, len(prompts[-1]), spans[-1], supervised_spans)


def turn_end_token_of(processor: Any) -> str:
    """The special token that ends an answer in the base's template: what a model learns to say."""
    shown = render_conversation(SHORT_EXAMPLE, processor)
    return find_trailing_token(shown.text[: shown.supervised_spans[-1][1]], tokenizer_of(processor))


def turn_end_tokens_of(processor: Any) -> set[str]:
    """The special tokens that end an answer, the last one or an earlier one, and nothing else.

    What ends an earlier answer may also stand between thoughts and answer (gpt-oss's): such a token
    ends none.
    """
    tokenizer = tokenizer_of(processor)
    two = render_conversation(_TWO_TURN_EXAMPLE, processor)
    earlier = find_trailing_token(two.text[slice(*two.supervised_spans[0])], tokenizer)
    last = turn_end_token_of(processor)
    thought = render_conversation(THOUGHTFUL_EXAMPLE, processor)
    inside = thought.text[thought.prompt_end : thought.answer_span[0]]
    return {last, earlier if earlier not in inside else last} - {""}


def find_answer_positions(example: Example) -> list[int]:
    """The positions of the answers among an example's messages."""
    return [n for n, message in enumerate(example.messages) if message["role"] == "assistant"]


def _prepare_messages(
    example: Example, processor: Any, ending: AnswerEnding
) -> tuple[list[Message], bool]:
    """The messages as the template gets them, and whether it asks for thoughts before an answer.

    A model that can think is asked to answer at once, unless the answer has thoughts. Templates
    read those in the answer's text or in a field of their own: in whichever form they come out.
    """
    messages = [_add_end_token(message, ending.added_token) for message in example.messages]
    if not split_thoughts(messages[-1])[0]:
        return messages, False
    for given in (messages, [*messages[:-1], move_thoughts_to_field(messages[-1])]):
        if _renders_thoughts(example, given, processor):
            return given, True
    asked = render_messages(example, messages[:-1], processor, generation=True, thinking=True)
    return messages, bool(find_trailing_tags(asked))


def _renders_thoughts(example: Example, messages: list[Message], processor: Any) -> bool:
    """Whether thoughts and answer come out after the prompt, and no empty thoughts before them."""
    text = render_messages(example, messages, processor, thinking=True)
    asked = render_messages(example, messages[:-1], processor, generation=True, thinking=True)
    if not text.startswith(asked):
        return False
    thoughts, answer_text = split_thoughts(messages[-1])
    continuation = text[len(asked) :]
    closed = continuation.count(CLOSE_TAG) + (CLOSE_TAG in find_trailing_tags(asked))
    shown = all(
        remove_whitespace(piece) in remove_whitespace(continuation)
        for piece in (thoughts, answer_text)
    )
    return shown and closed <= 1 + answer_text.count(CLOSE_TAG)


def _add_end_token(message: Message, end: str) -> Message:
    if not end or message["role"] != "assistant":
        return message
    return {**message, "content": [{"type": "text", "text": text_of(message) + end}]}


def _find_ending(example: Example, processor: Any) -> AnswerEnding:
    """How the template ends an answer; the error for a template that refuses names the example."""
    try:
        eos = tokenizer_of(processor).eos_token
        return _probe_ending(
            processor, template_of(processor), tuple(list_end_tokens(processor)), eos
        )
    except DataError:
        render_messages(example, example.messages, processor)
        raise


@lru_cache(maxsize=64)
def _probe_ending(
    processor: Any, template: str, known: tuple[str, ...], eos: str | None
) -> AnswerEnding:
    """How the template ends an answer, found on a short one; `known` are tokens that may."""
    question, answer = SHORT_EXAMPLE.messages
    text = render_messages(SHORT_EXAMPLE, SHORT_EXAMPLE.messages, processor)
    end = _find_answer_span(SHORT_EXAMPLE, SHORT_EXAMPLE.messages, processor, 1, text, False)[1]
    if tokens := _count_leading_tokens(text[end:], known):
        return AnswerEnding(tokens, "", "")
    try:
        text = render_messages(SHORT_EXAMPLE, [question, answer, question], processor)
    except DataError:
        text = text[:end]
    if found := find_leading_token(text[end:], known):
        return AnswerEnding(0, found, "")
    if not eos:
        raise ModelError(
            "the base's chat template ends no answer and its tokenizer has no end token; "
            "give the tokenizer an eos_token"
        )
    return AnswerEnding(0, "", eos)


def _join_prompt_answer(
    example: Example, answer: Message, history: str, prompt_text: str, text: str, span: Span
) -> tuple[str, Span]:
    """The text with its last answer after the prompt that asks for it, and the answer's place.

    The template writes the two otherwise (LLaVA-OneVision's: a blank before the line break), or
    prompts begin thoughts that answers have lost (DeepSeek's). What is trained is what is asked.
    """
    if not (text.startswith(history) and prompt_text.startswith(history)):
        raise ModelError(
            f"{example.source} row {example.row}: the chat template's prompt is not a prefix of "
            "prompt + answer; give the base another chat template (chat_template.jinja)"
        )
    start, end = span
    thoughts, answer_text, tags = "", text[start:end], find_trailing_tags(prompt_text)
    if OPEN_TAG in tags:
        thoughts, answer_text = split_thoughts(answer)
        answer_text = answer_text.strip()
        thoughts = "" if CLOSE_TAG in tags else f"{thoughts.strip()}\n{CLOSE_TAG}\n\n"
    begun = prompt_text + thoughts
    return begun + answer_text + text[end:], (len(begun), len(begun + answer_text))


def _find_answer_span(
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
    marked = render_messages(example, others, processor, thinking=thinking)
    start = len(commonprefix([text, marked]))
    return start, len(text) - len(commonprefix([text[::-1], marked[::-1]]))


def _find_ending_stop(text: str, end: int, ending: AnswerEnding, processor: Any) -> int:
    """The character after the tokens that end an answer."""
    if ending.added_token:
        return end
    known = list_end_tokens(processor)
    tail = text[end:].lstrip() if ending.num_tokens else text[end:]
    for _ in range(ending.num_tokens or 1):
        if token := find_leading_token(tail, known):
            tail = tail[len(token) :]
            end = len(text) - len(tail)
    return end


def _count_leading_tokens(tail: str, known: Iterable[str]) -> int:
    """How many special tokens a text begins with, one after another, blanks before them aside."""
    number, tail = 0, tail.lstrip()
    while token := find_leading_token(tail, known):
        number += 1
        tail = tail[len(token) :]
    return number
