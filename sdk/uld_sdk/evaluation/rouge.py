"""ROUGE-L recall: how much of one answer comes back in another, in order."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from uld_adapters.errors import MissingExtra


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtra("rouge-score", "report") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(reference: str, answer: str) -> float:
    """ROUGE-L recall = LCS(reference, answer) / |reference|, in [0, 1], after Lin (2004).

    Words are lower-cased runs of letters and digits, Porter-stemmed when longer than three characters. An empty
    reference is recalled fully by an empty answer and not at all by any other.
    """
    if not reference.strip():
        return float(not answer.strip())
    return float(_scorer().score(reference, answer)["rougeL"].recall)


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
