"""The tokenizer in a GGUF file is the file's own, splits texts as llama.cpp does, and is refused in one sentence where there is none."""

from pathlib import Path

import pytest

import tiny
from tiny_gguf import write_vocabulary
from uld_adapters.gguf_file import gguf_tokenizer
from uld_adapters.vocabulary.opening import open_vocabulary
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
    assert gguf_tokenizer(file).convert_tokens_to_ids(END) == 259
