"""`uld-sdk align`: how a remote model's tokens and a small model's belong together."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uld_sdk.cli.options import Json
from uld_sdk.cli.output import facts, note, print_json, stdout, table, working

if TYPE_CHECKING:
    from uld_adapters.vocabulary.tokens import Vocabulary

SHOWN = 12  # neutral tokens in the table


def _opened(source: str, which: str) -> "Vocabulary":
    """A vocabulary; errors say which of the two it was to be."""
    from uld_adapters.errors import UldError
    from uld_adapters.vocabulary.opening import open_vocabulary

    try:
        return open_vocabulary(source)
    except UldError as error:
        error.message = f"{error.message} (given as {which})"
        raise


def align(
    remote: Annotated[str, typer.Option("--remote", help="The large model's tokenizer: folder, file, hub or tiktoken name.")],
    small: Annotated[str, typer.Option("--small", help="The small model's: the same, or an assistant's folder.")],
    text: Annotated[
        Path | None, typer.Option("--text", exists=True, dir_okay=False, help="Compare on this text; else on one that is hard to split.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Where the drawing goes, an HTML page.")] = Path(
        "alignment.html"
    ),
    as_json: Json = False,
) -> None:
    """Compare two tokenizers: which mode the client would run in, what they share, what stays neutral; draws both splits of a text."""
    from uld_adapters.errors import SaveFailed, UsageError
    from uld_adapters.vocabulary.classify import classify
    from uld_offset_models.saving import check_writable
    from uld_offset_models.sources import read_text
    from uld_sdk.evaluation.segmentation import SAMPLE, draw

    elsewhere = "choose another -o"
    check_writable(output, hint=elsewhere)
    with working("reading both tokenizers"):
        ours, theirs = _opened(remote, f"--remote, beside --small {small}"), _opened(small, f"--small, beside --remote {remote}")
        sample = SAMPLE if text is None else read_text(text, as_written=True)
        if not sample:
            raise UsageError(f"{text} is empty", hint="give a file with text, or leave --text out")
        fit = classify(ours, theirs, text=sample)
    drawn = fit.kind != "path"
    if drawn:
        page = draw(fit, ours, theirs, sample)
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise SaveFailed(f"{output} could not be written: {error.strerror}", hint=elsewhere) from error
    found = {
        "mode": fit.kind,
        "meaning": fit.sentence,
        "tokens (remote, small)": f"{ours.rows}, {theirs.rows}",
        "rows of the output heads, padding masked": ", ".join(str(side.head_rows or "unknown") for side in (ours, theirs)),
        "remote's tokens that the small side has, by bytes": fit.shared,
        "ends of the remote's tokens that are ends on the small side": fit.boundaries,
        "neutral tokens": len(fit.neutral),
    }
    if as_json:
        values = {"remote_rows": ours.rows, "small_rows": theirs.rows, "shared": fit.shared, "boundaries": fit.boundaries}
        values |= {"remote_head_rows": ours.head_rows or None, "small_head_rows": theirs.head_rows or None}
        neutral = [{"token": token, "why": why} for token, why in fit.neutral]
        print_json({"mode": fit.kind, "meaning": fit.sentence, **values, "neutral": neutral, "page": str(output) if drawn else None})
        return
    stdout().print(facts("", dict(found)))
    if fit.neutral:
        stdout().print(table("neutral: these tokens get no shift", ("token", "why"), fit.neutral[:SHOWN]))
    if len(fit.neutral) > SHOWN:
        note(f"and {len(fit.neutral) - SHOWN} more (--json lists them)")
    if drawn:
        note(f"both splits of the text: {output}")
