"""The base's chat template: which one it is, the form of content it takes, and what it writes."""

from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from itertools import product
from typing import Any

from jinja2 import TemplateSyntaxError

from mm_piece.data.example import Example, Message, text_of
from mm_piece.errors import DataError, ModelError, format_error, format_value

# What a text model without a chat template gets: the question, a line break, the answer, the end.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
# Comes out as it is only where a template writes a text: Python's and JSON's way of writing a list
# both escape it.
_PROBE = '\ue000"\ue000'
# Some templates tell the model today's date. A row must be the same tokens on every day, so they
# are told one day: the one that Llama's own templates name where they know none.
_FIXED_DATE = date(2024, 7, 26)
_DATE_MACRO = (
    "{% macro strftime_now(format) -%}{% set day = namespace(text=format) %}"
    "{% for code, value in DAY %}{% set day.text = day.text.replace(code, value) %}{% endfor %}"
    "{{ day.text }}{%- endmacro %}\n"
)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a text model's processor is its tokenizer."""
    return getattr(processor, "tokenizer", processor)


def is_text_only(processor: Any) -> bool:
    """Whether a processor is a text model's: its tokenizer itself."""
    return processor is tokenizer_of(processor)


def base_template_of(processor: Any) -> str | None:
    """The chat template that a base came with; of several the one called `default`.

    Raises ModelError where there is none of that name.
    """
    given = processor.chat_template
    if not isinstance(given, Mapping):
        return given
    if "default" not in given:
        raise ModelError(
            f"the base has several chat templates, {', '.join(sorted(given))}, and none is called "
            "'default'; save the one to use as chat_template.jinja in the base's folder"
        )
    return given["default"]


def template_of(processor: Any) -> str:
    """The chat template that is used; ModelError where a base that sees images has none."""
    template = base_template_of(processor) or (PLAIN_TEMPLATE if is_text_only(processor) else None)
    if template is None:
        raise ModelError("the base's processor has no chat template")
    return template


def render_messages(
    example: Example,
    messages: Sequence[Message],
    processor: Any,
    *,
    generation: bool = False,
    thinking: bool = False,
) -> str:
    """Messages of an example as the template writes them, begun as the tokenizer begins texts.

    Raises DataError, which names the example, for what the template refuses, and ModelError for a
    template that leaves out what is asked or answered.
    """
    tokenizer, template = tokenizer_of(processor), template_of(processor)
    _require_image_support(example, messages, processor, template)
    forms = [_choose_content_form(message["role"], processor, template) for message in messages]
    given = [
        message if typed else {**message, "content": text_of(message)}
        for message, typed in zip(messages, forms, strict=True)
    ]
    try:
        text = tokenizer.apply_chat_template(
            given,
            chat_template=_fix_template_date(template),
            tokenize=False,
            add_generation_prompt=generation,
            enable_thinking=thinking,
            thinking=thinking,  # what some templates call it
        )
    except Exception as error:  # the template is a program of others and may raise anything
        raise _make_refusal_error(example, messages, processor, error) from error
    for message, typed in zip(messages, forms, strict=True):
        if typed is None and message["role"] != "system":
            raise ModelError(f"the base's chat template leaves out the {message['role']}'s texts")
    return prepend_bos_token(text, tokenizer)


def prepend_bos_token(text: str, tokenizer: Any) -> str:
    """The text with the token in front that the tokenizer begins every text with."""
    bos = tokenizer.bos_token
    if not bos or text.startswith(bos):
        return text
    # Asked of a text, not of an empty one: what ends a text would stand there too, and may be the
    # same token.
    return bos + text if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else text


def _require_image_support(
    example: Example, messages: Sequence[Message], processor: Any, template: str
) -> None:
    """Raise DataError if a template has no place for the images of an example."""
    content_types = [
        content_part["type"] for message in messages for content_part in message["content"]
    ]
    if "image" not in content_types or is_text_only(processor):
        return
    if not _shows_images(tokenizer_of(processor), template):
        raise DataError(
            f"{example.source} row {example.row} has an image, but the base's chat template shows "
            "none; leave images out, or give the base a chat template that does"
        )


def _choose_content_form(role: str, processor: Any, template: str) -> bool | None:
    """Whether a role's content is given as typed parts, not as a string; None: neither comes out.

    A template that takes both gets what its kind of model usually gets; so does one that takes
    neither: the conversation itself may be what it wants, or meets its refusal.
    """
    forms = (False, True) if is_text_only(processor) else (True, False)
    tokenizer = tokenizer_of(processor)
    accepted_forms = [_accepts_form(tokenizer, template, role, typed) for typed in forms]
    if accepted_forms == [None, None]:
        return forms[0]
    return next((typed for typed, taken in zip(forms, accepted_forms, strict=True) if taken), None)


@lru_cache(maxsize=64)
def _accepts_form(tokenizer: Any, template: str, role: str, typed: bool) -> bool | None:
    """Whether a template writes out a role's texts that it is given in a form; None: it refuses."""
    found = []
    for asked in (typed, not typed):  # the other turn may need the other form
        probe, other = _make_turn(role, _PROBE, typed), _make_turn("user", "?", asked)
        turns = {"system": [probe, other], "user": [probe], "assistant": [other, probe]}[role]
        found.append(_try_render(tokenizer, template, turns))
    return None if found == [None, None] else any(_PROBE in (text or "") for text in found)


@lru_cache(maxsize=64)
def _shows_images(tokenizer: Any, template: str) -> bool:
    """Whether a template writes anything for an image beside a text, as far as can be told.

    One that refuses every probe may do so for the conversation itself, and then says why.
    """
    bare = _make_turn("user", _PROBE, True)
    shown = {**bare, "content": [{"type": "image"}, *bare["content"]]}
    plain = _make_turn("user", _PROBE, False)
    written, without, string = (
        _try_render(tokenizer, template, [turn]) for turn in (shown, bare, plain)
    )
    if written is None:
        return without is string is None
    return _PROBE in written and written != without


def _try_render(tokenizer: Any, template: str, turns: list[Any]) -> str | None:
    """What a template writes for some turns; None if it does not take them.

    Raises ModelError for what is no template.
    """
    try:
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the base's chat template has an error in line {error.lineno}: {format_error(error)}"
        ) from error
    except Exception:  # the template is a program of others and may raise anything
        return None


def _make_turn(role: str, text: str, typed: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if typed else text}


def _fix_template_date(template: str) -> str:
    """The template with one day for `strftime_now`, which else tells today's date."""
    if "strftime_now" not in template:
        return template
    letters = product(("-", ""), "AaBbcDdeFHIjMmpSUwWXxYyZ")  # %-d is %d without zeros in front
    day = []
    for dash, letter in letters:
        written = _FIXED_DATE.strftime(f"%{letter}")
        day.append([f"%{dash}{letter}", (written.lstrip("0") or "0") if dash else written])
    return _DATE_MACRO.replace("DAY", repr([*day, ["%%", "%"]])) + template


def _make_refusal_error(
    example: Example, messages: Sequence[Message], processor: Any, error: Exception
) -> DataError:
    """The error for a conversation that the template refuses, and what would mend it."""
    description = f"the base's chat template refuses it: {format_value(error, 200)}"
    others = [message for message in messages if message["role"] != "system"]
    if len(others) < len(messages):
        try:
            render_messages(example, others, processor)
            description += "; without its system message it would not: write that into the question"
        except (DataError, ModelError):
            pass
    return DataError(f"{example.source} row {example.row}: {description}")
