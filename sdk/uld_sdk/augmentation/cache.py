"""Replies on disk, a line each as soon as it has come, so that an interrupted run goes on and no text is asked for twice."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from uld_adapters.errors import SaveFailed

_FORMAT = 1


@dataclass(frozen=True)
class Reply:
    """What a server answered; `finish` is "length" where it was cut off."""

    text: str
    finish: str


def key(model: str, prompt: str, sampling: dict[str, Any]) -> str:
    """SHA-256 over all that decides a reply."""
    return hashlib.sha256(json.dumps([_FORMAT, model, prompt, sampling], sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """A JSONL file of replies by key, mode 0600; a line that an interruption tore is skipped, and so asked for again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replies: dict[str, Reply] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._failed(error) from error
        os.fchmod(self._file, 0o600)
        text = path.read_bytes()
        for line in text.split(b"\n"):
            self._load(line)
        if text and not text.endswith(b"\n"):
            self._write(b"\n")

    def _load(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            found, text, finish = entry["key"], entry["text"], entry["finish"]
        except (ValueError, TypeError, KeyError):
            return
        if isinstance(found, str) and isinstance(text, str) and isinstance(finish, str):
            self._replies[found] = Reply(text, finish)

    def get(self, key: str) -> Reply | None:
        """The reply of a key, if there is one."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply, on disk before this returns; raises `SaveFailed`."""
        self._write(json.dumps({"key": key, "text": reply.text, "finish": reply.finish}).encode() + b"\n")
        self._replies[key] = reply

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> SaveFailed:
        what = error.strerror or str(error)
        return SaveFailed(f"{self.path} could not be written: {what}", hint="free some space, or choose another place with --cache")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        if not self._replies:  # nothing to go on from
            self.path.unlink(missing_ok=True)
