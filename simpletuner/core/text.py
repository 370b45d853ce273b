"""Text that is shown to people and kept in logs."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(?i)(https?://)(?:[^\s/?#]*@)?([^\s?#]*)([?#]\S*)?")

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What moves a terminal's cursor, rings its bell or clears it; a file's name may hold it."""


LARGE_PICTURE = "Image size .* exceeds limit"
"""What Pillow warns of from 89 megapixels on; up to 178 a picture is used all the same."""


def printable(text: str) -> str:
    """`text` without what must not be shown.

    Web addresses lose their passwords and their queries, which may be signed; control characters
    but line feeds and tabs are escaped.
    """
    masked = _ADDRESS.sub(lambda m: m[1] + m[2] + ("?…" if m[3] else ""), text)
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", masked)
