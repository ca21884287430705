"""The process of one contender: JSON lines on its input and output, one answer for each request.

Runs in the contender's own environment, by path, and imports nothing but the standard library and the contender's own
file. Its ``load(options)`` returns a function from a request (``{"prompts": [[ids]], "new_tokens": n}``) to an answer:
``events``, ``[seconds since the request began, sequence, new tokens]`` in order of time, and ``tokens``, new ids by
sequence. An exception is the answer ``{"error": ...}``.

    python worker.py CONTENDER.py '{"model": ..., ...}'
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1


def _load(path: str, options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("contender", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["contender"] = module
    spec.loader.exec_module(module)
    loaded: Callable[[dict[str, Any]], dict[str, Any]] = module.load(options)
    return loaded


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent does: stopped between its turns, it would stay for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _answer(line: TextIO, answer: dict[str, Any]) -> None:
    line.write(json.dumps(answer) + "\n")
    line.flush()


def main() -> None:
    """Load the contender, say so, and answer until the input ends."""
    _end_with_parent()
    # Libraries print to standard output as they like: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        run = _load(sys.argv[1], json.loads(sys.argv[2]))
    except Exception as error:
        traceback.print_exc()
        _answer(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        gc.collect()
        try:
            answer = run(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _answer(answers, answer)


if __name__ == "__main__":
    main()
