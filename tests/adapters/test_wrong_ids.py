"""Ids, roles and texts that cannot belong to a vocabulary are refused where they are given."""

import json
from pathlib import Path
from typing import Any

import pytest

from rank_files import rank_file, ranks_of
from uld_adapters.errors import UsageError
from uld_adapters.vocabulary.classify import classify
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.tokens import Vocabulary

BYTES = ranks_of([])
PATTERN = r"\S+|\s+"
END: dict[int, Role] = {256: Role.END_OF_TEXT}


@pytest.mark.parametrize(
    ("control", "says"),
    [
        ({"<|im_end|>": 38}, r"<\|im_end\|> is 38, which is the token b'&' in .*small.tiktoken"),
        ({"<|im_end|>": -1}, r"<\|im_end\|> is -1, which is no id"),
        ({"<|im_end|>": "300"}, r"<\|im_end\|> is '300', which is no id"),
    ],
)
def test_control_ids_of_rank_files(control: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Vocabulary.from_tiktoken(rank_file(tmp_path / "small.tiktoken", BYTES), pattern=PATTERN, control=control)
    assert "ids" in caught.value.hint


def test_control_ids_of_encodings() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: rank for rank, token in enumerate(BYTES)}
    encoding = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(UsageError, match="which is the token b'&' in small"):
        Vocabulary.from_tiktoken(encoding, control={"<end>": 38})


@pytest.mark.parametrize("pattern", [None, PATTERN])
@pytest.mark.parametrize(("content", "says"), [("", "it is empty"), ("\n", "it is empty"), ("YQ== -1\n", "it has the rank -1")])
def test_rank_files(content: str, says: str, pattern: str | None, tmp_path: Path) -> None:
    file = tmp_path / "wrong.tiktoken"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=f"wrong.tiktoken is no tiktoken rank file: {says}"):
        Vocabulary.from_tiktoken(file, pattern=pattern)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"control": {999: Role.END_OF_TEXT}}, "control has the id 999, and there are 257 tokens"),
        ({"control": {-1: Role.END_OF_TEXT}}, "control has the id -1"),
        ({"control": {256: "end"}}, "control has 'end', which is no role"),
        ({"control": END, "order": [999]}, "order has the id 999"),
        ({"control": END, "order": [-1]}, "order has the id -1"),
    ],
)
def test_tokens_as_bytes(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Vocabulary.from_bytes([*BYTES, b"<end>"], **given)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "token", "says"),
    [
        ({}, "!!", "base64"),
        ({"default_vocab_size": 13}, "YQ==", "10 control tokens and 1 others make no vocabulary of 13"),
        ({"default_vocab_size": 10}, "YQ==", "make no vocabulary of 10"),
        ({"default_num_special_tokens": -1}, "YQ==", "-1 control tokens"),
    ],
)
def test_tekken_files(config: dict[str, int], token: str, says: str, tmp_path: Path) -> None:
    said = {"pattern": PATTERN, "default_vocab_size": 11, "default_num_special_tokens": 10, **config}
    file = tmp_path / "tekken.json"
    file.write_text(json.dumps({"config": said, "vocab": [{"rank": 0, "token_bytes": token, "token_str": None}]}), encoding="utf-8")
    with pytest.raises(UsageError, match=f"tekken.json is no tekken file: .*{says}"):
        Vocabulary.from_tekken(file)


def test_lone_surrogates() -> None:
    vocabulary = Vocabulary.from_bytes([*BYTES, b"<end>"], control=END, order=range(256))
    with pytest.raises(UsageError, match=r"not valid Unicode: the character at place 1, U\+D800, is a lone surrogate") as caught:
        vocabulary.encode("a\ud800")
    assert "UTF-8" in caught.value.hint
    other = Vocabulary.from_bytes([*BYTES, b"ab", b"<end>"], control={257: Role.END_OF_TEXT}, order=range(257))
    with pytest.raises(UsageError, match="place 0"):
        classify(other, vocabulary, text="\ud800")


def test_a_closed_side_is_named() -> None:
    opened = Vocabulary.from_bytes([*BYTES, b"<end>"], control=END, order=range(256))
    closed = Vocabulary.from_bytes([*BYTES, b"<end>"], control=END)
    assert "how the remote splits text: one spelling" in classify(closed, opened).sentence
    assert "how the small model splits text: nothing can be read" in classify(opened, closed).sentence
    other = Vocabulary.from_bytes([*BYTES, b"<stop>"], control=END)
    assert "how the remote or the small model splits text" in classify(other, closed).sentence
