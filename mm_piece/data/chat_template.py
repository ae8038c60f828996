"""The base's chat template: which one it is, the form of content it takes, and what it writes.

Templates are programs of others. What one takes is found by probes: short messages that it renders.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from itertools import product
from typing import Any

from jinja2 import TemplateSyntaxError

from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.processor import Processor, Tokenizer, is_text_only, tokenizer_of
from mm_piece.errors import DataError, ModelError, format_error, format_value

# For a language model without a chat template: question, line break, answer, end token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
# A text that comes out unchanged only where a template writes a text: Python's and JSON's ways of
# writing a list both escape it.
_PROBE = '\ue000"\ue000'
_QUESTION_PROBE = "\ue001"
# Some templates write today's date. A row must be the same tokens on every day, so they get one
# day: the one that Llama's own templates name where they know none.
_FIXED_DATE = date(2024, 7, 26)
_DATE_MACRO = (
    "{% macro strftime_now(format) -%}{% set day = namespace(text=format) %}"
    "{% for code, value in DAY %}{% set day.text = day.text.replace(code, value) %}{% endfor %}"
    "{{ day.text }}{%- endmacro %}\n"
)


def base_template_of(processor: Processor | Tokenizer) -> str | None:
    """Return the chat template that a base came with; of several the one called `default`.

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


def template_of(processor: Processor) -> str:
    """Return the chat template to use: the base's, or the plain one for a language model.

    Raises ModelError where a base that sees images has none.
    """
    template = base_template_of(processor)
    if template:
        return template
    if is_text_only(processor):
        return PLAIN_TEMPLATE
    raise ModelError("the base's processor has no chat template")


def render_messages(
    example: Example,
    messages: Sequence[Message],
    processor: Processor,
    *,
    generation: bool = False,
    thinking: bool = False,
) -> str:
    """Return messages of an example as the template writes them.

    The text begins as the tokenizer begins texts. With `generation` it ends in the prompt for an
    answer; `thinking` asks for thoughts before one. Raises DataError, which names the example, for
    messages that the template refuses, and ModelError for a template that leaves out questions or
    answers.
    """
    tokenizer = tokenizer_of(processor)
    template = template_of(processor)
    _require_image_support(example, messages, processor, template)

    given = []
    omitted_roles = []
    for message in messages:
        role = message["role"]
        typed = _choose_content_form(role, processor, template)
        if typed is None:
            omitted_roles.append(role)
        if not typed:
            message = {**message, "content": text_of(message)}
        given.append(message)

    try:
        text = tokenizer.apply_chat_template(
            given,
            chat_template=_fix_template_date(template),
            tokenize=False,
            add_generation_prompt=generation,
            enable_thinking=thinking,
            thinking=thinking,  # some templates have this name for it
        )
    except Exception as error:  # the template is a program of others and may raise anything
        raise _make_refusal_error(example, messages, processor, error) from error

    # only now: a template that refuses the conversation says more about it
    for role in omitted_roles:
        if role != "system":
            raise ModelError(f"the base's chat template leaves out the {role}'s texts")
    return prepend_bos_token(text, tokenizer)


def find_default_system_prompt(processor: Processor) -> str:
    """Return the system text that the template writes where a conversation has none; "" for none.

    Found by probes: what stands where a system text of ours would stand.
    """
    tokenizer = tokenizer_of(processor)
    template = _fix_template_date(template_of(processor))
    user_typed = bool(_choose_content_form("user", processor, template))
    system_typed = bool(_choose_content_form("system", processor, template))
    question = _make_turn("user", _QUESTION_PROBE, user_typed)
    system = _make_turn("system", _PROBE, system_typed)

    without = _try_render(tokenizer, template, [question]) or ""
    given = _try_render(tokenizer, template, [system, question]) or ""
    start, probe, rest = given.partition(_PROBE)
    end, question_probe, _ = rest.partition(_QUESTION_PROBE)
    written, _, _ = without.partition(_QUESTION_PROBE)
    if not probe or not question_probe:
        return ""

    has_both_sides = written.startswith(start) and written.endswith(end)
    if not has_both_sides or len(written) < len(start) + len(end):
        return ""
    return written.removeprefix(start).removesuffix(end).strip()


def prepend_bos_token(text: str, tokenizer: Tokenizer) -> str:
    """Return the text after the token that the tokenizer begins every text with."""
    bos = tokenizer.bos_token
    if not bos or text.startswith(bos):
        return text

    # not of an empty text: the token that ends a text would stand there too, and may be the same
    first_ids = tokenizer("a")["input_ids"][:1]
    if first_ids != [tokenizer.bos_token_id]:
        return text
    return bos + text


def _require_image_support(
    example: Example,
    messages: Sequence[Message],
    processor: Processor,
    template: str,
) -> None:
    """Raise DataError if a template has no place for the images of an example."""
    content_types = set()
    for message in messages:
        for content_part in message["content"]:
            content_types.add(content_part["type"])
    if "image" not in content_types or is_text_only(processor):
        return

    if not _shows_images(tokenizer_of(processor), template):
        raise DataError(
            f"{example.source} row {example.row} has an image, but the base's chat template shows "
            "none; leave images out, or give the base a chat template that does"
        )


def _choose_content_form(
    role: str,
    processor: Processor,
    template: str,
) -> bool | None:
    """Return whether a role's content is given as typed parts, not as a string.

    Returns None if the texts come out in neither form. A template that takes both gets the usual
    form for its kind of model. So does one that refuses both: it may take the conversation itself,
    or say why it does not.
    """
    tokenizer = tokenizer_of(processor)
    usual = not is_text_only(processor)
    accepts_usual = _accepts_form(tokenizer, template, role, usual)
    accepts_other = _accepts_form(tokenizer, template, role, not usual)
    if accepts_usual is accepts_other is None:
        return usual

    if accepts_usual:
        return usual
    if accepts_other:
        return not usual
    return None


@lru_cache(maxsize=64)
def _accepts_form(
    tokenizer: Tokenizer,
    template: str,
    role: str,
    typed: bool,
) -> bool | None:
    """Return whether a template writes a role's texts, given in a form; None if it refuses them."""
    probe = _make_turn(role, _PROBE, typed)
    rendered = []
    for other_typed in (typed, not typed):  # the other turn may need the other form
        other = _make_turn("user", "?", other_typed)
        turns_of_role = {
            "system": [probe, other],
            "user": [probe],
            "assistant": [other, probe],
        }
        text = _try_render(tokenizer, template, turns_of_role[role])
        if text is not None:
            rendered.append(text)

    if not rendered:
        return None
    return any(_PROBE in text for text in rendered)


@lru_cache(maxsize=64)
def _shows_images(tokenizer: Tokenizer, template: str) -> bool:
    """Return whether a template writes anything for an image beside a text, as far as probes show.

    A template that refuses every probe counts as one that does: it may refuse the conversation
    itself, too, and then says why.
    """
    without_image = _make_turn("user", _PROBE, True)
    content = [{"type": "image"}, *without_image["content"]]
    with_image = {**without_image, "content": content}
    as_string = _make_turn("user", _PROBE, False)

    written = _try_render(tokenizer, template, [with_image])
    written_without = _try_render(tokenizer, template, [without_image])
    written_string = _try_render(tokenizer, template, [as_string])
    if written is None:
        return written_without is written_string is None
    return _PROBE in written and written != written_without


def _try_render(tokenizer: Tokenizer, template: str, turns: list[Any]) -> str | None:
    """Return what a template writes for some turns; None if it refuses them.

    Raises ModelError for a template with an error of syntax.
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
    content = [{"type": "text", "text": text}] if typed else text
    return {"role": role, "content": content}


def _fix_template_date(template: str) -> str:
    """Return the template with one day for `strftime_now`, which else writes today's date."""
    if "strftime_now" not in template:
        return template

    values = []
    for dash, letter in product(("-", ""), "AaBbcDdeFHIjMmpSUwWXxYyZ"):
        written = _FIXED_DATE.strftime(f"%{letter}")
        if dash:  # %-d is %d without zeros in front
            written = written.lstrip("0") or "0"
        values.append([f"%{dash}{letter}", written])
    values.append(["%%", "%"])

    # lists of texts are written alike in Python and Jinja
    macro = _DATE_MACRO.replace("DAY", repr(values))
    return macro + template


def _make_refusal_error(
    example: Example,
    messages: Sequence[Message],
    processor: Processor,
    error: Exception,
) -> DataError:
    """Return the error for a conversation that the template refuses, and what would mend it."""
    description = f"the base's chat template refuses it: {format_value(error, 200)}"
    others = [message for message in messages if message["role"] != "system"]
    if len(others) < len(messages):
        # many templates refuse system messages alone
        try:
            render_messages(example, others, processor)
            description += "; without its system message it would not: write that into the question"
        except (DataError, ModelError):
            pass
    return DataError(f"{example.source} row {example.row}: {description}")
