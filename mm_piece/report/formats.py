"""Numbers and texts of a page, as a reader sees them."""

import re
from collections.abc import Sequence

from markupsafe import Markup, escape

from mm_piece.metrics.intervals import format_interval
from mm_piece.plaintext import make_printable
from mm_piece.sizes import format_bytes

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")  # a SHA-256, and how much of it is shown


def format_percent(fraction: float | None) -> str:
    """Format a score for a table whose unit is stated once: 0.725 → 72.5."""
    if fraction is None:
        return "–"
    return f"{100 * fraction:.1f}"


def format_points(difference: float | None) -> str:
    """Format a signed difference of scores, in percentage points."""
    if difference is None:
        return "–"

    # rounded first: a difference that is shown as 0.0 has a plus sign
    sign = "−" if round(difference, 3) < 0 else "+"
    return f"{sign}{abs(100 * difference):.1f}"


def format_share(fraction: float) -> str:
    """Format a fraction that may be tiny, to three digits: 0.00098 → 0.098 %."""
    if 0 < fraction < 1e-6:
        return "< 0.0001 %"

    # `.3g` alone would write an exponent from 1000 % on
    rounded = float(f"{100 * fraction:.3g}")
    return f"{rounded:g} %"


def format_permille(fraction: float) -> str:
    """Format a density in thousandths, short enough for a small cell."""
    value = 1000 * fraction
    # from 9.95 on, one digit after the point would round to 10.0
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}"


def format_count(number: int) -> str:
    """Format a whole number with its thousands apart."""
    return f"{number:,}"


def format_fact(value: object) -> str:
    """Format any value of a delta's `info` for one cell."""
    if isinstance(value, dict):
        return ", ".join(_format_item(key, item) for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return format_count(value)
    if isinstance(value, list):
        return "; ".join(format_fact(item) for item in value)
    return str(value)


def _format_item(key: object, item: object) -> str:
    """Format one item of a mapping; a nested mapping is set in parentheses."""
    text = format_fact(item)
    if isinstance(item, dict):
        return f"{key} ({text})"
    return f"{key} {text}"


def format_spread(values: Sequence[float]) -> str:
    """Format the mean of fractions in percent, and half its interval where there are several."""
    if not values:
        return "–"
    return format_interval(values).replace("-", "−")


def format_duration(seconds: float | None) -> str:
    """Format a time by its two largest units: 75.2 → 1 min 15 s."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"

    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_loss(loss: float | None) -> str:
    """Format a training loss to three digits."""
    if loss is None:
        return "–"
    return f"{loss:.3g}"


def shorten_digests(text: str) -> Markup:
    """Return text as HTML in which 12 digits stand for a SHA-256, with all of them as its title."""
    # escaped first: what is put in afterwards is hexadecimal digits alone
    escaped = escape(make_printable(text, lines=True))
    return Markup(_DIGEST.sub(r'<code title="\g<0>">\g<1></code>', str(escaped)))


TEMPLATE_FILTERS = {
    "percent": format_percent,
    "points": format_points,
    "share": format_share,
    "permille": format_permille,
    "size": format_bytes,
    "count": format_count,
    "fact": format_fact,
    "spread": format_spread,
    "duration": format_duration,
    "loss": format_loss,
    "digests": shorten_digests,
}
