"""Tiktoken's rank files: a token in base64 and its rank a line. What else an encoding is, is known of those that were published."""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from uld_adapters.errors import MissingExtra, UsageError

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _SUFFIX
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _SUFFIX
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_LLAMA3 = {
    "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008, "<|eot_id|>": 128009, "<|python_tag|>": 128010, "<|reserved_special_token_247|>": 128255,
}  # fmt: skip
# Published rank files, known by their SHA-256: name, pattern, control tokens.
RANK_FILES: dict[str, tuple[str, str, dict[str, int]]] = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": ("r50k_base", _GPT2, {"<|endoftext|>": 50256}),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": ("p50k_base", _GPT2, {"<|endoftext|>": 50256}),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (
        "cl100k_base", _CL100K,
        {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276},
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": (
        "o200k_base", _O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": ("llama3", _CL100K, _LLAMA3),
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": (
        "qwen", _CL100K.replace("{1,3}", ""), {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
}  # fmt: skip


def tiktoken_parts(source: Any, pattern: str | None, control: Mapping[str, int] | None) -> tuple[dict[int, bytes], str, dict[str, int]]:
    """Ranks, pattern and control tokens of a tiktoken encoding: a rank file, the name of an encoding, or an Encoding."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_file():
        blob = path.read_bytes()
        try:
            rows = (line.split() for line in blob.splitlines() if line)
            ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in rows}
            if not ranks:
                raise ValueError("it is empty")
            if min(ranks) < 0:
                raise ValueError(f"it has the rank {min(ranks)}")
        except (ValueError, binascii.Error) as error:
            raise UsageError(
                f"{path} is no tiktoken rank file: {error}", hint="give a file whose lines are a token in base64 and its rank"
            ) from error
        _, known, special = RANK_FILES.get(hashlib.sha256(blob).hexdigest(), ("", None, {}))
        if pattern is None and known is None:
            raise UsageError(
                f"{path} is a rank file of an unknown encoding: it does not tell where texts are cut",
                hint="give the model's tokenizer.json, or in Python tokenizer=Vocabulary.from_tiktoken(file, pattern=..., control=...)",
            )
        return ranks, pattern or str(known), special if control is None else _beside(ranks, control, path)
    if path is not None:
        try:
            import tiktoken
        except ModuleNotFoundError as error:
            raise MissingExtra("tiktoken", "tiktoken") from error
        try:
            source = tiktoken.get_encoding(str(source))
        except Exception as error:  # unknown names and missing networks raise unrelated classes
            raise UsageError(
                f"no tiktoken encoding {str(source)!r} could be loaded ({type(error).__name__}: {str(error).splitlines()[0][:120]})",
                hint="without a network give its rank file, as in from_tiktoken('o200k_base.tiktoken'), or set TIKTOKEN_CACHE_DIR",
            ) from error
    ranks = {rank: token for token, rank in source._mergeable_ranks.items()}
    special = dict(source._special_tokens) if control is None else _beside(ranks, control, source.name)
    return ranks, pattern or source._pat_str, special


def _beside(ranks: Mapping[int, bytes], control: Mapping[str, Any], whose: str | Path) -> dict[str, int]:
    """The ids of control tokens by name; raises `UsageError` for what is no id, or that of another token."""
    for name, token in control.items():
        if not isinstance(token, Integral) or token < 0:
            raise UsageError(f"control says that {name} is {token!r}, which is no id", hint="give ids from 0 on by the tokens' names")
        if token in ranks:
            raise UsageError(
                f"control says that {name} is {token}, which is the token {ranks[int(token)]!r} in {whose}",
                hint="give the ids of the control tokens themselves, as in the model's tokenizer_config.json: ranks are text",
            )
    return {name: int(token) for name, token in control.items()}
