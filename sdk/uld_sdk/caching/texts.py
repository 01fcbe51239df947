"""The texts that training will ask about, as token ids: of forget and retain rows, of refusals, and of further data."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uld_adapters.errors import UsageError
from uld_adapters.vocabulary.alignment import require_identity
from uld_adapters.vocabulary.tokens import tokenizer_fingerprint
from uld_offset_models.data import Example, check_overlap, data_hash, read_rows
from uld_offset_models.encoding import Encoded, encode, uses_chat_template
from uld_offset_models.refusals import read_refusals, refused

if TYPE_CHECKING:
    from uld_offset_models.sources import Source


@dataclass(frozen=True)
class Text:
    """One text: the `row` by which training will ask for it, the `prompt` as the target reads it, and where it was written."""

    row: Encoded
    prompt: tuple[int, ...]
    place: str


@dataclass(frozen=True)
class Examples:
    """What is to be scored, and a hash of each set."""

    examples: tuple[Example, ...]
    hashes: Mapping[str, str]


def read_examples(
    *, forget: "Source | None", retain: "Source | None", data: "Sequence[Source]", refusals: str | None, seed: int
) -> Examples:
    """Every row with its paraphrases, and with `refusals` every forget question with its refusal, as training pairs them by the seed.

    Wrong answers are left out: they are for assistants. Raises `DataError` with file and line, `UsageError` where nothing is given.
    """
    named = {"forget": forget, "retain": retain, **{f"data {number}": source for number, source in enumerate(data, 1)}}
    rows = {name: read_rows(source, name=name) for name, source in named.items() if source is not None}
    if not rows:
        raise UsageError("no text was given", hint="add --forget, --retain or --data")
    check_overlap(rows.get("forget", []), rows.get("retain", []))
    found = {name: [e for row in part for e in (row.example, *row.paraphrases)] for name, part in rows.items()}
    hashes = {name: data_hash(part) for name, part in rows.items()}
    if refusals is not None:
        if forget is None:
            raise UsageError("refusals are answers to the forget questions, and there is no forget set", hint="add --forget")
        lines = read_refusals(refusals)
        found["refusals"] = refused(found["forget"], lines, seed=seed)
        hashes["refusals"] = hashlib.sha256("\n".join([str(seed), *lines]).encode()).hexdigest()
    return Examples(tuple(e for part in found.values() for e in part), hashes)


def encode_texts(examples: Sequence[Example], target: Any, base: Any, *, chat_template: bool, longest: int) -> list[Text]:
    """Each different text once, its prompt by the target's chat template and its row by that of the `base` which will be trained.

    Both are tokenizers of one vocabulary. Raises `TokenizerMismatch`, `DataError` for rows longer than `longest` or without an answer, and
    `UsageError` where base and target end an answer in two ways.
    """
    if base is not target:
        require_identity(tokenizer_fingerprint(target), tokenizer_fingerprint(base))
    both = [
        encode(tokenizer, examples, chat_template=uses_chat_template(tokenizer, wanted=chat_template), max_length=longest)
        for tokenizer in ((base, target) if base is not target else (base,))
    ]
    texts: dict[Encoded, Text] = {}
    for example, row, asked in zip(examples, both[0], both[-1], strict=True):
        if row.answer != asked.answer:
            names = [tokenizer.convert_ids_to_tokens(ids.answer[-1]) for tokenizer, ids in ((base, row), (target, asked))]
            raise UsageError(
                f"{example.place}: the base ends this answer with {names[0]}, the target with {names[1]}",
                hint="train a base with the target's end token, or leave --base out and give the base as --tokenizer",
            )
        texts.setdefault(row, Text(row, asked.prompt, example.place))
    return list(texts.values())
