"""`uld_sdk.calibrate(...)`, which `uld-sdk calibrate` calls: observe the hold-outs once, sweep the grid, choose, record."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from uld_adapters.backend import Capabilities
from uld_adapters.errors import SaveFailed, UsageError
from uld_adapters.http import TALLY, Tally
from uld_offset_models.artifact import recalibrate
from uld_offset_models.data import Row, check_overlap, data_hash
from uld_offset_models.manifest import Calibration, Manifest, read_manifest
from uld_offset_models.saving import check_writable
from uld_offset_models.shift import Rule
from uld_sdk.calibration.choice import ALPHAS, FILTERS, MARGINS, PAIR_FILTERS, Thresholds, Values, grid_values
from uld_sdk.calibration.observer import Observer
from uld_sdk.calibration.position import Observed
from uld_sdk.calibration.result import CalibrationResult
from uld_sdk.calibration.rows import check_others, check_unseen, read_holdout
from uld_sdk.calibration.sweep import SWEPT, Point, grid, sweep, swept
from uld_sdk.options import ConnectionKeywords

if TYPE_CHECKING:
    from uld_offset_models.sources import Source

_DECIDED = ("assistant", *SWEPT, "tail", "on_touched", "refusal", "draft", "trace")


def calibrate(
    artifact: str | Path,
    *,
    forget_holdout: "Source",
    retain_holdout: "Source",
    apart_from: "str | Path | Sequence[Source]" = (),
    alphas: Values | None = None,
    margins: Values | None = None,
    filters: Values | None = None,
    forget_changed: float = 0.95,
    retain_identical: float = 0.9,
    max_new_tokens: int = 64,
    concurrency: int = 8,
    plot: str | Path | None = None,
    dry_run: bool = False,
    on_line: Callable[[str], None] | None = None,
    **connection: Unpack[ConnectionKeywords],
) -> CalibrationResult:
    """Choose an assistant's or a pair's alpha, margin and filter on hold-out rows, and write them into its manifest with their rule.

    Every answer is scored once and read once; the grid costs no request. A row without an answer is answered by the plain server
    first (greedy, at most `max_new_tokens`), and its shares are then what the client itself would do. `alphas`, `margins` (nats)
    and `filters` are lists, or text with commas; without them a default grid and the artifact's own values. Rule: the smallest
    alpha, then the largest margin, then the smallest filter, with at least `forget_changed` of the forget answers changed among those
    with at least `retain_identical` of the retain answers identical; where nothing meets it, nothing is written. `plot` is a .html,
    .svg or .png file; `dry_run` writes nothing else. The other keywords are those of `UnlearnedClient`.

    Never give it the test set of an evaluation: what was chosen on a set cannot be judged on it. Name such sets as `apart_from`,
    and a hold-out that asks what they ask is refused, as one is that the assistant was trained on. Raises `UsageError`, `DataError`,
    `ArtifactError`, `TokenizerMismatch`, `SaveFailed`, and what the backend raises.
    """
    begin = time.perf_counter()
    _check(connection, max_new_tokens=max_new_tokens, concurrency=concurrency)
    thresholds = Thresholds(forget_changed, retain_identical)
    manifest = read_manifest(artifact)
    before = Rule(manifest.alpha, manifest.margin, manifest.filter, manifest.method, manifest.tail)
    axes = (
        grid_values("--alphas", alphas, ALPHAS, own=before.alpha),
        grid_values("--margins", margins, MARGINS, own=before.margin),
        grid_values("--filters", filters, FILTERS if manifest.method == "uld" else PAIR_FILTERS, own=before.filter),
    )
    if plot is not None:
        from uld_sdk.calibration.page import check_plot

        check_plot(Path(plot))
    sets = {
        kind: read_holdout(source, option=f"--{kind}-holdout") for kind, source in (("forget", forget_holdout), ("retain", retain_holdout))
    }
    check_overlap(sets["forget"], sets["retain"])
    others = check_others(sets, [apart_from] if isinstance(apart_from, str | Path) else apart_from)
    hashes = {kind: data_hash(rows) for kind, rows in sets.items()}
    check_unseen(hashes, manifest.data)
    if plot is not None and not Path(plot).exists():
        check_writable(Path(plot), hint="choose another --plot")
    if not dry_run:
        check_writable(Path(artifact).resolve(), hint="free some space there, or add --dry-run")

    tally = Tally()
    options: ConnectionKeywords = {**connection, "assistant": artifact, "margin": axes[1][0]}
    limits = {"max_new_tokens": max_new_tokens, "concurrency": concurrency}
    capabilities, seen = _run(_observed(options, sets, axes[2][0], limits, tally, on_line or _silent))
    points = sweep(seen["forget"], seen["retain"], grid(before, *axes))
    chosen = thresholds.choose(points)
    result = CalibrationResult(
        path=Path(artifact),
        rule=thresholds.text,
        thresholds=thresholds,
        chosen=chosen,
        nearest=thresholds.nearest(points),
        before=before,
        written=chosen is not None and not dry_run,
        points=tuple(points),
        rows={kind: len(rows) for kind, rows in sets.items()},
        holdout=hashes,
        apart_from=others,
        target=capabilities.model,
        top_logprobs=capabilities.top_logprobs,
        requests=tally.requests,
        seconds=time.perf_counter() - begin,
    )
    if plot is not None:
        from uld_sdk.calibration.page import write_plot

        write_plot(Path(plot), result)
    if chosen is not None and not dry_run:
        _record(result, chosen)
    return result


async def _observed(
    options: ConnectionKeywords,
    sets: Mapping[str, list[Row]],
    ratio: float,
    limits: Mapping[str, int],
    tally: Tally,
    say: Callable[[str], None],
) -> tuple[Capabilities, dict[str, list[Observed]]]:
    TALLY.set(tally)
    async with Observer(**options) as observer:
        capabilities = await observer.capabilities()
        rows = [row for part in sets.values() for row in part]
        say(_cost(rows, capabilities))
        seen = await observer.observe_all(rows, ratio=ratio, **limits)
    first = len(sets["forget"])
    return capabilities, {"forget": seen[:first], "retain": seen[first:]}


def _cost(rows: list[Row], capabilities: Capabilities) -> str:
    """What the rows will cost, before they do."""
    given = sum(bool(row.example.answer) for row in rows)
    each = "one request each" if capabilities.scoring == "prompt" else "up to one request a token"
    parts = [f"{len(rows) - given} rows to be answered, one request each"] if given < len(rows) else []
    parts += [f"{given} answers to be scored, {each}"] if given else []
    return "; ".join(parts)


def _record(result: CalibrationResult, chosen: Point) -> Manifest:
    calibration = Calibration(
        rule=result.rule,
        thresholds=asdict(result.thresholds),
        chosen=swept(chosen),
        before=swept(result.before),
        reached={name: value for name, value in chosen.to_dict().items() if name not in SWEPT and value is not None},
        holdout=dict(result.holdout),
        apart_from=list(result.apart_from),
        rows=dict(result.rows),
        target=result.target,
        top_logprobs=result.top_logprobs,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        return recalibrate(result.path, calibration)
    except SaveFailed as error:
        error.add_note(f"  chosen: --alpha {chosen.alpha:g} --margin {chosen.margin:g} --filter {chosen.filter:g}")
        raise


def _check(connection: ConnectionKeywords, **counts: object) -> None:
    for name in _DECIDED:
        if name in connection:
            raise UsageError(f"{name} is not for calibrate", hint="give alphas=, margins= and filters= to sweep; the artifact comes first")
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} is {value!r}", hint="give a whole number of 1 or more")


def _run(work: Any) -> Any:
    """Run a coroutine to its end, in a thread that has no event loop yet; raises `UsageError` in one that has."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    work.close()
    raise UsageError("calibrate cannot run inside an event loop", hint="await asyncio.to_thread(uld_sdk.calibrate, ...)")


def _silent(_: str) -> None:
    """Nobody listens."""
