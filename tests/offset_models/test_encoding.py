"""Token ids of rows: what is trained, and what is too long."""

from pathlib import Path

import pytest

import tiny
from uld_adapters.errors import DataError
from uld_offset_models.data import Example
from uld_offset_models.encoding import encode, prompt_text, uses_chat_template

ROW = Example((("user", "Who kept the lamp?"),), "Ada did.", "rows.jsonl:7")


def test_only_answer_and_end_of_turn_are_trained(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    row = encode(tokenizer, [ROW], chat_template=True, max_length=99)[0]
    assert tokenizer.decode(row.ids[: row.start]) == "<|user|>Who kept the lamp?<|assistant|>"
    assert tokenizer.decode(row.ids[row.start :]) == "Ada did.<|eos|>"


def test_the_end_of_turn_may_differ_from_the_end_token(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|user|>\n' }}{% endfor %}"
    row = encode(tokenizer, [ROW], chat_template=True, max_length=99)[0]
    assert row.ids[-1] == tokenizer.convert_tokens_to_ids("<|user|>")


@pytest.mark.parametrize("bos", [False, True])
def test_without_a_template_a_question_is_a_line(bos: bool, tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path, bos=bos)
    assert uses_chat_template(tokenizer, wanted=True)
    tokenizer.chat_template = None
    assert not uses_chat_template(tokenizer, wanted=True)
    row = encode(tokenizer, [ROW], chat_template=False, max_length=99)[0]
    begin = "<|bos|>" if bos else ""
    assert tokenizer.decode(row.ids) == f"{begin}Who kept the lamp?\nAda did.<|eos|>"
    assert tokenizer.decode(row.ids[: row.start]) == begin + prompt_text(tokenizer, ROW.messages, chat_template=False)


def test_plain_text_is_trained_whole_and_cut_to_fit(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    text = Example((), "The river runs through the old town.", "x:1", plain=True)
    whole = encode(tokenizer, [text], chat_template=True, max_length=99)[0]
    assert whole.start == 1
    assert tokenizer.decode(whole.ids) == "<|bos|>The river runs through the old town.<|eos|>"
    assert encode(tokenizer, [text], chat_template=True, max_length=4)[0].ids == whole.ids[:4]


def test_a_row_longer_than_the_context_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: question and answer take \d+ tokens, more than the 8 that fit") as caught:
        encode(tiny.tiny_tokenizer(tmp_path), [ROW], chat_template=True, max_length=8)
    assert "--max-length" in caught.value.hint


def test_a_template_that_refuses_is_reported(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    row = Example((("system", "Be brief."), ("user", "Hi?")), "Hello.", "x:3")
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}a<|eos|>"
    with pytest.raises(DataError, match=r"x:3: the base's chat template refuses these messages .*no system role"):
        encode(tokenizer, [row], chat_template=True, max_length=99)


@pytest.mark.parametrize("plain", [False, True])
def test_an_answer_that_the_tokenizer_drops_is_named(plain: bool, tmp_path: Path) -> None:
    from tokenizers import normalizers

    tokenizer = tiny.tiny_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    row = Example(() if plain else ROW.messages, "\u200b\u200b", "x:5", plain=plain)
    with pytest.raises(DataError, match="x:5: no token of the answer is left"):
        encode(tokenizer, [row], chat_template=True, max_length=99)
