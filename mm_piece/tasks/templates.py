"""A conversation as text: the base's chat template, and where in that text the answers stand."""

from os.path import commonprefix
from typing import Any

from mm_piece.errors import DataError, ModelError, reason
from mm_piece.tasks.examples import Example, Message, all_text_of, text_of

# What a text model without a chat template gets: the question, a line break, the answer, the end.
PLAIN = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
_MARKER = "\ue000"  # a private-use character: no answer begins or ends with it
_VISUAL = ("image_token", "video_token", "vision_start_token", "vision_end_token")
Span = tuple[int, int]


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a text model's processor is its tokenizer."""
    return getattr(processor, "tokenizer", processor)


def is_text(processor: Any) -> bool:
    """Whether a processor is a text model's: its tokenizer itself."""
    return processor is tokenizer_of(processor)


def prompt(example: Example, processor: Any, turn: int = -1) -> str:
    """The text up to the answer at message `turn` (default: the last), ready for generation."""
    return _render(example, example.messages[:turn], processor, generation=True)


def conversation(example: Example, processor: Any) -> tuple[str, list[Span]]:
    """The whole text and the characters of each answer in it, ended by a special token.

    An answer stands where the text changes when the answer does: so the span is right whatever the
    template adds, strips or leaves out. A template that ends no turn (LLaVA-1.5's) would teach a
    model never to stop: the text then ends in the tokenizer's own end token.
    """
    text = _render(example, example.messages, processor)
    spans = [_span(text, _marked(example, processor, turn)) for turn in answers(example)]
    end, tokenizer = spans[-1][1], tokenizer_of(processor)
    if special_at(text, end, tokenizer) or not tokenizer.eos_token:
        return text, spans
    return text[:end] + tokenizer.eos_token, spans


def turn_end(processor: Any) -> str:
    """The special token that ends an answer in the base's template: what a model learns to say."""
    question: Message = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer: Message = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
    text, spans = conversation(Example(0, [question, answer], [], "template"), processor)
    return special_at(text, spans[-1][1], tokenizer_of(processor))


def answers(example: Example) -> list[int]:
    """The positions of the answers among an example's messages."""
    return [n for n, message in enumerate(example.messages) if message["role"] == "assistant"]


def special_at(text: str, start: int, tokenizer: Any) -> str:
    """The special token that stands at a character of a text, or nothing."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return next((token for token in tokens if text.startswith(token, start)), "")


def special_in(example: Example, processor: Any) -> bool:
    """Whether a text of an example holds what the tokenizer reads as a special token."""
    added = tokenizer_of(processor).added_tokens_decoder.values()
    tokens = [token.content for token in added if token.special]
    texts = [all_text_of(message) for message in example.messages]
    return any(token in text for text in texts for token in tokens)


def require_no_visual_tokens(example: Example, processor: Any) -> None:
    """Raise DataError if a text holds a token that the base reads as an image."""
    tokens = [value for key, value in vars(processor).items() if key in _VISUAL and value]
    for message in example.messages:
        for token in tokens:
            if token in all_text_of(message):
                raise DataError(
                    f"{example.source} row {example.row}: the text holds {token!r}, which the "
                    "base reads as an image"
                )


def _span(text: str, marked: str) -> Span:
    start = len(commonprefix([text, marked]))
    return start, len(text) - len(commonprefix([text[::-1], marked[::-1]]))


def _marked(example: Example, processor: Any, turn: int) -> str:
    messages = list(example.messages)
    messages[turn] = {**messages[turn], "content": [{"type": "text", "text": _MARKER}]}
    return _render(example, messages, processor)


def _render(
    example: Example, messages: list[Message], processor: Any, generation: bool = False
) -> str:
    template = processor.chat_template
    if is_text(processor):  # templates of text models take plain strings
        messages = [{**message, "content": text_of(message)} for message in messages]
        template = template or PLAIN
    if not template:
        raise ModelError("the base's processor has no chat template")
    options = {"tokenize": False, "add_generation_prompt": generation, "chat_template": template}
    try:  # a model that can think is asked to answer at once
        text = tokenizer_of(processor).apply_chat_template(
            messages, enable_thinking=False, **options
        )
    except Exception as error:  # a template is a program of its own
        raise DataError(
            f"{example.source} row {example.row}: the base's chat template refuses it: "
            f"{reason(error)}"
        ) from error
    return _begun(text, tokenizer_of(processor))


def _begun(text: str, tokenizer: Any) -> str:
    """The text with the token in front that the tokenizer begins every text with."""
    bos = tokenizer.bos_token
    if bos and not text.startswith(bos) and tokenizer("")["input_ids"] == [tokenizer.bos_token_id]:
        return bos + text
    return text
