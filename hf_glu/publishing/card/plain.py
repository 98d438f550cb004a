"""Making texts of others' files harmless on a card: no markup, no links.

Characters that Markdown or HTML would take as their own are replaced, not escaped, since one word stands in a sentence,
in a code span and in a table, where different escapes count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_ALIKE = str.maketrans({"<": "\u2039", "`": "'", "\\": "\u2216"})
# what makes a link or an image of [words], or of an address in the text
_LINKS = (
    (re.compile(r"([\]!])(?=[(\[:])"), r"\1 "),
    (re.compile(r"(?<=\w)@(?=\w)"), " @ "),
    (re.compile(r"://"), ": //"),
    (re.compile(r"\b(www|mailto|xmpp|javascript|vbscript)(?=[.:])", re.IGNORECASE), r"\1 "),
)
_LICENSE_WORD = re.compile(r"[\w.+-]{1,96}")
_FITS = {
    "license": _LICENSE_WORD,
    "license_name": _LICENSE_WORD,
    "license_link": re.compile(r"https?://[\w.:/%#?&=~+-]+|\w[\w./-]*"),
    "language": re.compile(r"[A-Za-z][A-Za-z0-9-]{1,31}"),
}


def plain(data: object) -> Any:
    """Return JSON data in which texts have no markup, no address and no invisible character."""
    if isinstance(data, Mapping):
        return {plain(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if not isinstance(data, str):
        return data
    text = " ".join("".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in data).split())
    text = text.translate(_ALIKE)
    for pattern, replacement in _LINKS:
        text = pattern.sub(replacement, text)
    return text


def fitting(carried: Mapping[str, object]) -> dict[str, object]:
    """Return license and language of a base, without values that can't be one."""
    found = {}
    for key, pattern in _FITS.items():
        value = carried.get(key)
        words = value if isinstance(value, list) else [value]
        if words and all(isinstance(word, str) and pattern.fullmatch(word) for word in words):
            found[key] = value
    return found


def cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return text.replace("|", "\\|")
