"""`uld-sdk align`: the verdict, its figures, and both segmentations of a text above each other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from tiny_gguf import write_vocabulary
from uld_adapters.vocabulary.opening import open_vocabulary
from uld_sdk.cli import app
from uld_sdk.evaluation.segmentation import SAMPLE, blocks


def run(*arguments: object) -> Any:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="uld-sdk")
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    return outcome


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    tiny.tiny_tokenizer(folder, vocab_size=330)
    return folder


def test_two_tokenizers_are_compared_and_drawn(tiny_target: Path, small: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "both.html"
    outcome = run("align", "--remote", tiny_target, "--small", small, "-o", page, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert found["mode"] == "bridge"
    assert found["remote_rows"] == 400
    assert found["small_rows"] == 330
    assert 0.5 < found["shared"] <= 1
    assert 0.5 < found["boundaries"] <= 1
    drawn = page.read_text(encoding="utf-8")
    assert drawn.count('class="b ') > 50
    assert "bridge" in drawn
    assert not re.search(r"\b(src|href)\s*=|url\(|@import|<script|<link", drawn), "nothing is loaded from elsewhere"


def test_a_text_of_ones_own(tiny_target: Path, small: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse & the <river>.\n", encoding="utf-8")
    page = tmp_path / "page.html"
    outcome = run("align", "--remote", tiny_target, "--small", small, "--text", text, "-o", page)
    assert outcome.exit_code == 0
    assert "bridge" in outcome.stdout
    assert "&lt;" in page.read_text(encoding="utf-8"), "text is no markup"
    same = run("align", "--remote", tiny_target, "--small", tiny_target, "-o", page)
    assert "identity" in same.stdout


def test_line_ends_are_compared_as_they_are_written(tiny_target: Path, small: Path, tmp_path: Path) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    assert run("align", "--remote", tiny_target, "--small", small, "--text", text, "-o", page).exit_code == 0
    drawn = page.read_text(encoding="utf-8")
    assert drawn.count("\u240d") == 4, "both ends of a line, on both sides"
    assert "\ufeff" not in drawn
    text.write_bytes(b"\xef\xbb\xbf")
    empty = run("align", "--remote", tiny_target, "--small", small, "--text", text, "-o", page)
    assert (empty.exit_code, "text.txt is empty" in " ".join(empty.stderr.split())) == (2, True)


def test_a_page_that_cannot_be_written_is_told_before_the_work(tiny_target: Path, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for output, code, told in ((file / "x.html", 1, "is no folder"), (tmp_path, 2, "is a directory")):
        outcome = run("align", "--remote", tmp_path / "nothing", "--small", small, "-o", output)
        assert outcome.exit_code == code
        assert told in " ".join(outcome.stderr.split())
    unnamed = run("align", "--remote", "", "--small", small, "-o", tmp_path / "x.html")
    assert (unnamed.exit_code, "the name of a tokenizer is empty" in unnamed.stderr) == (2, True)


def test_what_is_no_tokenizer_is_said(tiny_target: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}", encoding="utf-8")
    outcome = run("align", "--remote", wrong, "--small", tiny_target, "-o", tmp_path / "x.html")
    assert outcome.exit_code == 2
    assert "is no tokenizer file" in outcome.stderr
    assert outcome.stdout == ""
    missing = run("align", "--remote", tmp_path / "missing", "--small", tiny_target)
    assert missing.exit_code == 2
    assert f"there is no file or folder {tmp_path / 'missing'}" in " ".join(missing.stderr.split())
    for kind, says in (("bert", "of kind 'bert', cannot be read"), (None, "holds no tokenizer")):
        file = write_vocabulary(tmp_path / "model.gguf", ["a", "b"], kind=kind)
        outcome = run("align", "--remote", file, "--small", tiny_target, "-o", tmp_path / "x.html")
        assert outcome.exit_code == 2
        assert says in outcome.stderr
        assert "model.gguf" in outcome.stderr
        assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("sides", [("--remote", "--small"), ("--small", "--remote")])
def test_an_error_says_which_side_it_is_about(tiny_target: Path, tmp_path: Path, sides: tuple[str, str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    for folder, says in ((empty, "there is no tokenizer in the folder"), (broken, "transformers can read none of its files")):
        outcome = run("align", sides[0], folder, sides[1], tiny_target, "-o", tmp_path / "x.html")
        told = " ".join(outcome.stderr.split())
        assert outcome.exit_code == 1
        assert says in told
        assert f"(given as {sides[0]}, beside {sides[1]} {tiny_target})" in told
        assert "fix: give a folder with tokenizer.json" in told


def test_blocks_hold_both_segmentations_whole(tiny_target: Path, small: Path) -> None:
    sides = []
    for source in (tiny_target, small):
        vocabulary = open_vocabulary(source)
        sides.append([vocabulary.tokens[token] for token in vocabulary.encode(SAMPLE)])
    found = list(blocks(*sides))
    assert [piece for upper, _ in found for piece in upper] == sides[0]
    assert [piece for _, lower in found for piece in lower] == sides[1]
    assert all(b"".join(upper) == b"".join(lower) for upper, lower in found)
