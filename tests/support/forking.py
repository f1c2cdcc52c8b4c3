"""Functions run in a forked child."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

from tests.support.waiting import eventually


def in_child(function: Callable[[], Any], timeout: float = 15) -> Any:
    """Run a function in a forked child, and return what it returns; it is killed if late."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer: dict[str, Any]
        try:
            answer = {"result": function()}
        except BaseException as error:
            answer = {"error": repr(error)}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    try:
        eventually(lambda: os.waitpid(pid, os.WNOHANG)[0], timeout, "the child hangs")
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read()
    answer = json.loads(data)
    assert "error" not in answer, answer
    return answer["result"]
