"""The password and token of all tests that sign in; no output may show it.

``conftest.py`` fails a test whose captured log, stdout or stderr has it, and ``Project`` one whose
commands and workers write it.
"""

from __future__ import annotations

SECRET = "s3cr3tCanary"
