"""A model under the emulator that says what the test says."""

from typing import Any

import numpy as np

from uld_adapters.emulator import EmulatorServer, build_app
from uld_adapters.emulator.engine import Engine, Row, Session


class ScriptedEngine(Engine):
    """The next token of a script has probability 0.9, however the prompt reads; `start` is the prompt's length in tokens."""

    script: tuple[int, ...] = ()
    start = 0

    async def next(self, session: Session) -> Row:
        row = np.full(self.rows, np.log(0.1 / (self.rows - 1)), dtype=np.float32)
        row[self.script[len(session.ids) - self.start]] = np.log(0.9)
        return row


def scripted(engine: Engine, *tokens: int, prompt: int, **options: Any) -> EmulatorServer:
    """A server of the engine's vocabulary that writes these tokens after a prompt of so many."""
    fake = ScriptedEngine(engine.model, engine.tokenizer, name="tiny")
    fake.script, fake.start = tokens, prompt
    return EmulatorServer(build_app(fake, **options))
