"""Ids out of what a server of the OpenAI kind tells: bytes, strings, and the text beside them."""

import codecs

import numpy as np

from uld_adapters.errors import LogprobsUnavailable, MalformedAnswer, TokenizerMismatch
from uld_adapters.logprobs import TopLogprobs
from uld_adapters.openai.names import Named, Told, looks_like_control
from uld_adapters.vocabulary.by_bytes import TokensByBytes

BROKEN = "\ufffd".encode()
UNTOLD = "use a server that tells the bytes of its tokens, or their ids"


class Transcript:
    """Reads one stream: the id and the report of each written token, in order, checked against the text.

    Half a character that comes without its bytes waits for the text that completes it, and is what can be split in one way
    only. Rivals that cannot be told apart are neutral.
    """

    def __init__(self, tokens: TokensByBytes, wanted: int) -> None:
        self._tokens, self._wanted = tokens, wanted
        self._waiting: list[Told] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._spelled = ""
        self._text = ""

    def push(self, told: list[Told], text: str) -> list[tuple[int, TopLogprobs]]:
        """Take what an event tells; returns the tokens that are known now."""
        self._waiting += told
        self._text += text
        found: list[tuple[int, TopLogprobs]] = []
        while self._waiting:
            first = self._waiting[0]
            if first.token.id is None and first.token.data is None:
                run = self._completed()
                if run is None:
                    break
            else:
                run = [self._id(first.token, b"")]
            done = b""
            for token in run:
                entry = self._waiting.pop(0)
                found.append((token, self.report(entry, token, done if len(run) > 1 else b"")))
                done += self._spell(token)
        self._compare()
        return found

    def close(self) -> bool:
        """The stream has ended: check the last text. Returns whether half a character is left that nobody can tell."""
        if not self._waiting:
            self._spelled += self._decoder.decode(b"", final=True)
            self._compare(last=True)
        return bool(self._waiting)

    def rivals(self, told: Told) -> TopLogprobs:
        """K at one position by itself, the written token among it only as it is reported."""
        return self.report(Told(Named(None), told.top), -1, b"")

    def _spell(self, token: int) -> bytes:
        data = self._tokens.spelling(token)
        self._spelled += self._decoder.decode(data)
        return data

    def _compare(self, *, last: bool = False) -> None:
        """Tokens and text must say the same; broken characters may come before the tokens that they are.

        A vocabulary's dummy space before the first word may be missing from the text.
        """
        if self._text and self._spelled.startswith(" ") and not self._text.startswith(" "):
            self._spelled = self._spelled[1:]
        n = min(len(self._spelled), len(self._text))
        if self._spelled[:n] != self._text[:n]:
            at = next(i for i in range(n) if self._spelled[i] != self._text[i])
            raise MalformedAnswer(
                f"the server's tokens spell {self._spelled[at : at + 20]!r} where its text says {self._text[at : at + 20]!r}",
                hint="its token strings cannot be relied on; use the backend of that server, if there is one",
            )
        ahead = self._text[n:]
        if ahead and not self._waiting and (last or ahead.strip("\ufffd")):
            raise LogprobsUnavailable(
                f"the server wrote {ahead[:20]!r} without log-probabilities", hint="ask a model that reports them for every token"
            )

    def _completed(self) -> list[int] | None:
        """The ids of the broken characters that wait, with the token that completes them; None as long as their text is not there."""
        new = self._text[len(self._spelled) :].encode()
        count = next((i for i, told in enumerate(self._waiting) if told.token.data or told.token.id is not None), len(self._waiting))
        known = self._waiting[count:]
        after = next((i for i, told in enumerate(known) if not told.token.data), len(known))
        rest = b"".join(told.token.data or b"" for told in known[:after])
        if not new:
            return None
        if known and new.startswith(rest):  # the token that completes a character is told as the whole character
            broken, count = known[0].token.data or b"", count + 1
        else:
            broken = new[: new.rfind(rest)] if rest and rest in new else new
        if BROKEN in broken:
            return None  # cut off, or never completed: the end of the stream tells
        ids, ways = self._tokens.only_split(broken, count, lambda _, piece: is_broken(piece))
        if ids is None:
            raise MalformedAnswer(
                f"the server tells {count} tokens by U+FFFD alone; they spell {broken!r}, in {'several' if ways else 'no'} possible ways",
                hint=UNTOLD,
            )
        return ids

    def _id(self, named: Named, pending: bytes) -> int:
        token = self._find(named, pending)
        if token is None:
            raise self._unknown(named)
        return token

    def _find(self, named: Named, pending: bytes) -> int | None:
        """The token that is meant; None where it cannot be told, or is a control token that the vocabulary does not name.

        After half a character, `pending`, a server that tells no bytes may name a token by the whole character.
        """
        if named.id is not None:
            rows = self._tokens.vocabulary.tokens
            if named.data and 0 <= named.id < len(rows) and len(rows[named.id]) < len(named.data) and named.data.endswith(rows[named.id]):
                raise LogprobsUnavailable(
                    f"the server told nothing of the tokens before the id {named.id}, whose bytes came with it: {named.data!r}",
                    hint="use the backend of that server, which asks for them again (llamacpp)",
                )
            if not 0 <= named.id < len(rows) or (named.data is not None and rows[named.id] != named.data):
                raise self._unknown(named)
            return named.id
        if named.data is None:
            return None
        if pending and named.data.startswith(pending):
            token = self._tokens.text(named.data[len(pending) :])
            if token is not None:
                return token
        token = self._tokens.find(named.data)
        if token is None and not looks_like_control(named.data):
            raise self._unknown(named)
        return token

    def _unknown(self, named: Named) -> TokenizerMismatch:
        what = f"the id {named.id}, {named.data!r}" if named.id is not None else repr(named.data)
        return TokenizerMismatch(
            f"the server wrote {what}, which the tokenizer {self._tokens.vocabulary.name} does not have as a token",
            hint="pass tokenizer=... of the served model",
        )

    def report(self, told: Told, token: int, pending: bytes) -> TopLogprobs:
        """K at one position. Tokens of the same bytes add up; what fewer entries than asked for leave open is bounded by the tail."""
        values: dict[int, float] = {}
        neutral: list[float] = []
        for named in told.top:
            if named.logprob is None:
                continue
            rival = self._find(named, pending)
            if rival is None:
                neutral.append(named.logprob)
            elif values.get(rival, named.logprob) == named.logprob:
                values[rival] = named.logprob
            else:
                values[rival] = float(np.logaddexp(values[rival], named.logprob))
        own = told.token.logprob
        if own is not None and token not in values:
            values[token] = own
            if told.token.data is None and own in neutral:
                neutral.remove(own)  # the written token itself, told by U+FFFD
        missing = self._wanted - len(told.top)
        if told.top and missing > 0:
            tail = 1.0 - float(np.exp([*values.values(), *neutral]).sum())
            neutral += [float(np.log(tail))] * missing if tail > 0 else []
        return TopLogprobs.build(list(values), list(values.values()), neutral=neutral)


def is_broken(data: bytes) -> bool:
    """Whether bytes are no whole characters by themselves."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False
