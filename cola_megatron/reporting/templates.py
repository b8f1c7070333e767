"""The templates of pages that need no other file."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Control characters as their visible pictures (U+2400 ...), and lone surrogates, which UTF-8 cannot hold, as U+FFFD.
# Newline and tab stay: the page keeps white space.
_VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
)


def page_environment() -> Environment:
    """Templates of this folder; what they are given is escaped, and a name that they are not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": _visible, "unseen": _unseen}
    return environment


def _visible(text: str) -> str:
    """Text that can stand in a page and be seen; escaping is left to the template."""
    return text.translate(_VISIBLE)


def _unseen(text: str) -> str:
    """Words for a text that shows nothing on a page, else ""."""
    if not text:
        return "(empty)"
    return "" if text.strip() else f"({len(text)} white-space characters)"
