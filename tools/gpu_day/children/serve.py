"""The children's half of the conversation: requests on stdin, answers on what was stdout, one JSON line each."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable


class Answers:
    """Keeps stdout for answers; whatever prints is written to stderr."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def write(self, message: dict) -> None:
        self.file.write(json.dumps(message, default=str) + "\n")
        self.file.flush()

    def note(self, **fields: object) -> None:
        self.write({"note": fields})


def serve(answers: Answers, handlers: dict[str, Callable[..., dict]]) -> None:
    """Answers each request {"do": name, ...} with its handler's result, or with what it raised."""
    answers.note(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except Exception as failure:
            traceback.print_exc()
            answer = {"status": "failed", "why": f"{type(failure).__name__}: {failure}"[:2000]}
        answers.write(answer)
