"""The tokenizer in a GGUF file is the file's own, splits texts as llama.cpp does, and is refused in one sentence where there is none."""

from pathlib import Path

import pytest

import tiny
from real_tokenizers import installed
from tiny_gguf import write_gguf, write_vocabulary
from uld_adapters.errors import UsageError
from uld_adapters.gguf_file import gguf_tokenizer, is_gguf
from uld_adapters.vocabulary.bpe import Bpe
from uld_adapters.vocabulary.classify import classify
from uld_adapters.vocabulary.control import Role
from uld_adapters.vocabulary.fingerprint import CORPUS
from uld_adapters.vocabulary.opening import open_tokenizer, open_vocabulary
from uld_adapters.vocabulary.tokens import Vocabulary, _byte_alphabet, load_tokenizer

LETTERS = {byte: letter for letter, byte in _byte_alphabet().items()}
END = "<|eot_id|>"


def written(data: bytes) -> str:
    return "".join(LETTERS[byte] for byte in data)


def words_file(path: Path, pre: str = "llama-bpe") -> Path:
    """Letters, what two merges make, a word that no merge makes, and an end of turn."""
    words = [written(bytes([byte])) for byte in range(256)]
    return write_vocabulary(path, [*words, "ab", "cd", "abcd", END], ["a b", "c d"], pre=pre, control=[END])


def test_tokenizer_files_beside_it_are_anothers(tmp_path: Path) -> None:
    own = words_file(tmp_path / "own.gguf")
    alone = Vocabulary.from_gguf(own)
    tiny.tiny_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_text("{}", encoding="utf-8")
    assert Vocabulary.from_gguf(own).fingerprint == alone.fingerprint == open_vocabulary(own).fingerprint
    assert Vocabulary.from_hf(load_tokenizer(own)).tokens == alone.tokens
    assert gguf_tokenizer(own).chat_template is None


def test_the_tokenizer_is_named_after_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = gguf_tokenizer(words_file(tmp_path / "own.gguf"))
    assert tokenizer.name_or_path == tokenizer.init_kwargs["name_or_path"] == str(tmp_path)
    assert "uld-" not in str(vars(tokenizer)).replace(str(tmp_path), "")
    monkeypatch.chdir(tmp_path)
    assert gguf_tokenizer(Path("own.gguf")).encode("ab") == tokenizer.encode("ab"), "a relative path"


@pytest.mark.parametrize("refused", [("symlink",), ("symlink", "link")])
def test_where_no_link_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]) -> None:
    def no(*paths: object) -> None:
        raise OSError("not permitted")

    file = words_file(tmp_path / "own.gguf")
    for name in refused:
        monkeypatch.setattr(f"os.{name}", no)
    assert len(gguf_tokenizer(file)) == 260


def test_a_token_for_each_of_the_files_and_no_other(tmp_path: Path) -> None:
    file = words_file(tmp_path / "own.gguf")
    vocabulary = Vocabulary.from_gguf(file)
    assert len(load_tokenizer(file)) == vocabulary.rows == vocabulary.head_rows == 260
    assert vocabulary.roles == {259: Role.END_OF_TURN}
    assert load_tokenizer(file).eos_token_id == 259


@pytest.mark.parametrize(("pre", "ids"), [("llama-bpe", [258]), ("tekken", [258]), ("gpt-2", [256, 257]), ("qwen2", [256, 257])])
def test_a_word_that_is_a_token_is_that_token_where_llamacpp_says_so(tmp_path: Path, pre: str, ids: list[int]) -> None:
    file = words_file(tmp_path / "own.gguf", pre)
    tokenizer, vocabulary = load_tokenizer(file), Vocabulary.from_gguf(file)
    assert tokenizer.encode("abcd", add_special_tokens=False) == ids
    assert vocabulary.encode("abcd") == ids
    assert vocabulary.encode(END) == [END.encode()[at] for at in range(len(END))], "text that looks like a control token is text"


def test_llama_3_in_a_gguf_file_is_llama_3(tmp_path: Path) -> None:
    known = installed("llama3")
    assert known.spelling is not None
    speller = known.spelling.speller
    assert isinstance(speller, Bpe)
    names = {token: known.tokens[token].decode().replace(" ", "_") for token in known.control}  # the unused ones have spaces
    words = [names.get(token) or written(data) for token, data in enumerate(known.tokens)]
    merges = [f"{written(left)} {written(right)}" for left, right in speller.order(known.tokens)[0]]
    control = sorted(names.values(), key=lambda name: name != END)
    file = write_vocabulary(tmp_path / "llama3.gguf", words, merges, pre="llama-bpe", control=control)
    ours = Vocabulary.from_gguf(file)
    assert ours.rows == ours.head_rows == known.rows
    assert ours.roles == known.roles
    assert classify(known, ours).kind == "identity"
    for text in (*CORPUS, " gerekmektedir"):
        assert ours.encode(text) == known.encode(text)


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path, tiny_target: Path) -> None:
    file = write_gguf(tiny_target, tmp_path / "own.gguf")
    expected = Vocabulary.from_gguf(file)
    blob = file.rename(tmp_path / "sha256-0a1b")
    assert is_gguf(blob)
    assert not is_gguf(tmp_path)
    assert Vocabulary.from_gguf(blob).fingerprint == open_vocabulary(blob).fingerprint == expected.fingerprint
    assert open_vocabulary(blob).head_rows == expected.head_rows
    assert len(load_tokenizer(blob)) == len(open_tokenizer(blob)) == expected.rows


@pytest.mark.parametrize("name", ["model.gguf", "sha256-0a1b"])
@pytest.mark.parametrize(("kind", "says"), [(None, "holds no tokenizer"), ("bert", "of kind 'bert', cannot be read: ")])
def test_a_tokenizer_that_cannot_be_read_is_said(tmp_path: Path, name: str, kind: str | None, says: str) -> None:
    file = write_vocabulary(tmp_path / name, ["a", "b"], kind=kind)
    for read in (Vocabulary.from_gguf, Vocabulary.from_hf, load_tokenizer, open_vocabulary, open_tokenizer):
        with pytest.raises(UsageError, match=says) as caught:
            read(file)
        assert str(file) in caught.value.message
        assert "tokenizer.json" in caught.value.hint
