"""Two segmentations of one text above each other, as an HTML page with nothing loaded from elsewhere."""

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from string import Template

from uld_adapters.vocabulary.classify import Fit, pieces, spelled_by_both
from uld_adapters.vocabulary.tokens import Vocabulary

SAMPLE = (
    "The lighthouse keeper's daughter wouldn't leave; she'd counted 1,234,567 waves since 1998.\n"
    "def area(width, height):\n    return {'value': width * height,  'unit': \"m²\"}\n"
    "Überraschung im Café: naïve Straßenmusik, Ελληνικά, кириллица, 漢字とかな交じり文, 한국어.\n"
    "👩‍👩‍👧‍👦 waved 🏳️‍🌈 at <|user|> and [INST]  twice…\n"
)
LONGEST = 20_000  # bytes of a text that are drawn


def draw(fit: Fit, remote: Vocabulary, small: Vocabulary, text: str) -> str:
    """The page: the remote's tokens in the upper row, the small side's in the lower one, cut where both have an end."""
    page = Template((files("uld_sdk.evaluation") / "segmentation.html").read_text(encoding="utf-8"))
    data = spelled_by_both(remote, small, text.encode()[:LONGEST].decode(errors="ignore"))
    return page.substitute(
        title=escape(f"{fit.kind}: {fit.sentence}"),
        remote=escape(fit.remote),
        small=escape(fit.small),
        shared=f"{fit.shared:.1%}",
        boundaries="" if fit.boundaries is None else f"{fit.boundaries:.1%}",
        neutral=str(len(fit.neutral)),
        blocks="".join(_block(upper, lower) for upper, lower in blocks(pieces(remote, data), pieces(small, data))),
    )


def blocks(first: list[bytes], second: list[bytes]) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """The shortest stretches of two segmentations that begin and end together."""
    upper: list[bytes] = []
    lower: list[bytes] = []
    rest, sizes = iter(second), [0, 0]
    for piece in first:
        upper.append(piece)
        sizes[0] += len(piece)
        while sizes[1] < sizes[0]:
            other = next(rest)
            lower.append(other)
            sizes[1] += len(other)
        if sizes[0] == sizes[1]:
            yield upper, lower
            upper, lower = [], []


def _block(upper: list[bytes], lower: list[bytes]) -> str:
    kind = "same" if len(upper) == len(lower) == 1 else "other"
    rows = "".join(f"<span>{''.join(_token(piece) for piece in row)}</span>" for row in (upper, lower))
    breaks = "<br>" if upper[-1].endswith(b"\n") else ""
    return f'<span class="b {kind}">{rows}</span>{breaks}'


def _token(piece: bytes) -> str:
    try:
        shown = piece.decode().replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    except UnicodeDecodeError:
        shown = piece.hex(" ")
    return f'<i title="{escape(repr(piece)[2:-1], quote=True)}">{escape(shown)}</i>'
