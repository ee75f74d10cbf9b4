"""Reading single flags of vLLM's out of a command line that vLLM itself will parse later."""

from __future__ import annotations

from collections.abc import Sequence


def value(flags: Sequence[str], name: str) -> str | None:
    """The last value given to `name`, as `--name value` or `--name=value`; "" for a bare flag, None if absent."""
    found = None
    for index, item in enumerate(flags):
        head, equals, text = item.partition("=")
        if head.replace("_", "-") == name:
            following = flags[index + 1] if index + 1 < len(flags) else ""
            found = text if equals else ("" if following.startswith("-") else following)
    return found


def number(flags: Sequence[str], name: str) -> int | None:
    """A flag's whole number, where it is given as one: vLLM's own suffixes (`4k`) are left to vLLM."""
    text = value(flags, name)
    return int(text) if text is not None and text.isdigit() else None
