"""The programs of docs/integrations.md, by the heading that they stand under."""

import re

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "integrations.md").read_text()
PROGRAMS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
