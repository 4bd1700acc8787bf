"""A hook of `make docs`: links out of docs/, such as to the code, lead nowhere on the site and become plain text."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace `[text](../place)` by its text, and an image by nothing, where the place is outside docs/."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"(!?)\[([^\]]*)\]\({re.escape(up)}[^)]*\)", lambda m: "" if m[1] else m[2], markdown)
