"""A conversation as text: the prompt for each answer, and what the model is to generate."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from os.path import commonprefix
from typing import NamedTuple

from mm_piece.data.chat_template import render_messages, template_of
from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.processor import Processor, tokenizer_of
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
    """A conversation as text, and the places in it that matter, in characters."""

    text: str
    prompt_end: int  # where the prompt for the last answer ends, and generation begins
    answer_span: Span  # the last answer itself, within what the model generates
    supervised_spans: list[Span]  # all that the model generates, up to the token that ends it


class AnswerEnding(NamedTuple):
    """How a template ends an answer: one of the three is set."""

    num_tokens: int  # special tokens that it writes after an answer, whitespace before them aside
    next_token: str  # the special token that stands there when another turn follows
    added_token: str  # the token that every answer is given


def make_message(role: str, text: str, **fields: str) -> Message:
    """Build a message of text alone."""
    content = [{"type": "text", "text": text}]
    return {"role": role, "content": content, **fields}


SHORT_EXAMPLE = Example(
    row=0,
    messages=[make_message("user", "?"), make_message("assistant", "!")],
    images=[],
    source="template",
)
_TWO_TURN_EXAMPLE = replace(
    SHORT_EXAMPLE,
    messages=SHORT_EXAMPLE.messages * 2,
)
THOUGHTFUL_EXAMPLE = replace(
    SHORT_EXAMPLE,
    messages=[
        make_message("user", "?"),
        make_message("assistant", "!", reasoning_content=MARKER),
    ],
)


def render_prompt(example: Example, processor: Processor) -> str:
    """Return the text up to the last answer, ready for generation."""
    ending = _find_ending(example, processor)
    messages, thinking = _prepare_messages(example, processor, ending)
    return _render_question(example, messages[:-1], processor, thinking)


def render_conversation(example: Example, processor: Processor) -> RenderedConversation:
    """Return the whole text; the prompt for the last answer begins it.

    An answer stands where the text changes when the answer does. Its place is then right whatever
    the template adds, strips or leaves out. A template that ends no turn (LLaVA-1.5's) would train
    a model never to stop: each answer then ends in the tokenizer's own end token.
    """
    ending = _find_ending(example, processor)
    messages, thinking = _prepare_messages(example, processor, ending)
    text = render_messages(example, messages, processor, thinking=thinking)

    turns = find_answer_positions(example)
    spans = []
    for turn in turns:
        span = _find_answer_span(example, messages, processor, turn, text, thinking)
        spans.append(span)
    prompts = []
    for turn in turns:
        prompt = _render_question(example, messages[:turn], processor, thinking)
        prompts.append(prompt)

    last_prompt = prompts[-1]
    if not text.startswith(last_prompt):
        history = render_messages(example, messages[:-1], processor, thinking=thinking)
        text, spans[-1] = _join_prompt_answer(
            example, messages[-1], history, last_prompt, text, spans[-1]
        )
    if not ending.num_tokens:
        _, last_end = spans[-1]
        text = text[:last_end] + ending.next_token

    supervised_spans = []
    for prompt, (start, end) in zip(prompts, spans, strict=True):
        # the template may write more than the answer after the prompt: all of it is generated
        if text.startswith(prompt):
            start = len(prompt)
        stop = _find_ending_stop(text, end, ending, processor)
        supervised_spans.append((start, stop))
    return RenderedConversation(
        text=text,
        prompt_end=len(last_prompt),
        answer_span=spans[-1],
        supervised_spans=supervised_spans,
    )


def turn_end_token_of(processor: Processor) -> str:
    """Return the special token that ends an answer in the base's template, and so generation."""
    rendered = render_conversation(SHORT_EXAMPLE, processor)
    _, stop = rendered.supervised_spans[-1]
    return find_trailing_token(rendered.text[:stop], tokenizer_of(processor))


def turn_end_tokens_of(processor: Processor) -> set[str]:
    """Return the special tokens that end an answer, the last one or an earlier one.

    The token that ends an earlier answer may also stand between thoughts and answer (gpt-oss's):
    it ends nothing then, and is left out.
    """
    two_turns = render_conversation(_TWO_TURN_EXAMPLE, processor)
    start, stop = two_turns.supervised_spans[0]
    earlier = find_trailing_token(two_turns.text[start:stop], tokenizer_of(processor))
    last = turn_end_token_of(processor)

    thoughtful = render_conversation(THOUGHTFUL_EXAMPLE, processor)
    answer_start, _ = thoughtful.answer_span
    before_answer = thoughtful.text[thoughtful.prompt_end : answer_start]

    tokens = {last}
    if earlier not in before_answer:
        tokens.add(earlier)
    return tokens - {""}


def find_answer_positions(example: Example) -> list[int]:
    """Return the positions of the answers among an example's messages."""
    positions = []
    for position, message in enumerate(example.messages):
        if message["role"] == "assistant":
            positions.append(position)
    return positions


def _render_question(
    example: Example,
    messages: list[Message],
    processor: Processor,
    thinking: bool,
) -> str:
    """Return the text of messages that end in a question, ready for generation."""
    return render_messages(
        example,
        messages,
        processor,
        generation=True,
        thinking=thinking,
    )


def _prepare_messages(
    example: Example,
    processor: Processor,
    ending: AnswerEnding,
) -> tuple[list[Message], bool]:
    """Return the messages for the template, and whether it asks for thoughts before an answer.

    A model that can think is asked to answer at once, unless the answer has thoughts. Templates
    read those in the answer's text or in a field of their own: the form in which they come out
    counts.
    """
    messages = [_add_end_token(message, ending.added_token) for message in example.messages]
    *earlier, answer = messages
    thoughts, _ = split_thoughts(answer)
    if not thoughts:
        return messages, False

    with_field = [*earlier, move_thoughts_to_field(answer)]
    for given in (messages, with_field):
        if _renders_thoughts(example, given, processor):
            return given, True

    # neither comes out: the thoughts are lost, but a prompt may begin some
    prompt = _render_question(example, earlier, processor, thinking=True)
    return messages, bool(find_trailing_tags(prompt))


def _renders_thoughts(
    example: Example,
    messages: list[Message],
    processor: Processor,
) -> bool:
    """Return whether thoughts and answer come out after the prompt, without empty thoughts."""
    text = render_messages(example, messages, processor, thinking=True)
    prompt = _render_question(example, messages[:-1], processor, thinking=True)
    if not text.startswith(prompt):
        return False

    continuation = text[len(prompt) :]
    written = remove_whitespace(continuation)
    thoughts, answer_text = split_thoughts(messages[-1])
    for piece in (thoughts, answer_text):
        if remove_whitespace(piece) not in written:
            return False

    # a second closing tag is that of empty thoughts, unless the answer speaks of tags
    num_closed = continuation.count(CLOSE_TAG)
    if CLOSE_TAG in find_trailing_tags(prompt):
        num_closed += 1
    return num_closed <= 1 + answer_text.count(CLOSE_TAG)


def _add_end_token(message: Message, end: str) -> Message:
    if not end or message["role"] != "assistant":
        return message
    text = text_of(message) + end
    content = [{"type": "text", "text": text}]
    return {**message, "content": content}


def _find_ending(example: Example, processor: Processor) -> AnswerEnding:
    """Return how the template ends an answer."""
    try:
        eos = tokenizer_of(processor).eos_token
        template = template_of(processor)
        end_tokens = tuple(list_end_tokens(processor))
        return _probe_ending(processor, template, end_tokens, eos)
    except DataError:
        # what refuses the probe most likely refuses the example, whose error names the example
        render_messages(example, example.messages, processor)
        raise


@lru_cache(maxsize=64)
def _probe_ending(
    processor: Processor,
    template: str,
    known: tuple[str, ...],
    eos: str | None,
) -> AnswerEnding:
    """Return how the template ends an answer, found on a short one.

    `known` are the tokens that may end one. `template` only tells entries of the cache apart: a
    processor may be given another.
    """
    messages = SHORT_EXAMPLE.messages
    question, answer = messages
    text = render_messages(SHORT_EXAMPLE, messages, processor)
    _, end = _find_answer_span(SHORT_EXAMPLE, messages, processor, 1, text, False)
    num_tokens = _count_leading_tokens(text[end:], known)
    if num_tokens:
        return AnswerEnding(num_tokens, "", "")

    # some templates end an answer only where the next question begins
    try:
        text = render_messages(SHORT_EXAMPLE, [question, answer, question], processor)
    except DataError:
        text = text[:end]
    next_token = find_leading_token(text[end:], known)
    if next_token:
        return AnswerEnding(0, next_token, "")

    if not eos:
        raise ModelError(
            "the base's chat template ends no answer and its tokenizer has no end token; "
            "give the tokenizer an eos_token"
        )
    return AnswerEnding(0, "", eos)


def _join_prompt_answer(
    example: Example,
    answer: Message,
    history: str,
    prompt: str,
    text: str,
    span: Span,
) -> tuple[str, Span]:
    """Return the text with its last answer right after its prompt, and the span of the answer.

    The template writes the two otherwise (LLaVA-OneVision's: a space before the line break), or
    prompts begin thoughts that answers have lost (DeepSeek's). The prompt decides: generation
    begins with it, and so must training.
    """
    if not (text.startswith(history) and prompt.startswith(history)):
        raise ModelError(
            f"{example.source} row {example.row}: the chat template's prompt is not a prefix of "
            "prompt + answer; give the base another chat template (chat_template.jinja)"
        )

    start, end = span
    answer_text = text[start:end]
    before = prompt
    tags = find_trailing_tags(prompt)
    if OPEN_TAG in tags:
        # the prompt has the opening tag: the answer goes on behind it
        thoughts, answer_text = split_thoughts(answer)
        answer_text = answer_text.strip()
        if CLOSE_TAG not in tags:
            before += f"{thoughts.strip()}\n{CLOSE_TAG}\n\n"

    joined_text = before + answer_text
    answer_span = (len(before), len(joined_text))
    return joined_text + text[end:], answer_span


def _find_answer_span(
    example: Example,
    messages: list[Message],
    processor: Processor,
    turn: int,
    text: str,
    thinking: bool,
) -> Span:
    """Return where an answer stands in the text: what changes when the answer does."""
    marker_content = [{"type": "text", "text": MARKER}]
    others = list(messages)
    others[turn] = {**messages[turn], "content": marker_content}
    marked = render_messages(example, others, processor, thinking=thinking)

    start = len(commonprefix([text, marked]))
    # the common suffix is the common prefix of the texts read backwards
    num_after = len(commonprefix([text[::-1], marked[::-1]]))
    return start, len(text) - num_after


def _find_ending_stop(
    text: str,
    end: int,
    ending: AnswerEnding,
    processor: Processor,
) -> int:
    """Return the character after the tokens that end an answer; `end` is where the answer ends."""
    if ending.added_token:  # it is part of the answer
        return end

    known = list_end_tokens(processor)
    tail = text[end:]
    if ending.num_tokens:
        tail = tail.lstrip()  # some templates write a line break before the token
    for _ in range(ending.num_tokens or 1):
        token = find_leading_token(tail, known)
        if token:
            tail = tail[len(token) :]
            end = len(text) - len(tail)
    return end


def _count_leading_tokens(tail: str, known: Iterable[str]) -> int:
    """Return how many special tokens a text begins with, one after another.

    Whitespace before the first is skipped.
    """
    tail = tail.lstrip()
    number = 0
    while token := find_leading_token(tail, known):
        number += 1
        tail = tail[len(token) :]
    return number
