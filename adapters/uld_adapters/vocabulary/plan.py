"""How texts go on with a candidate, found out once for all places where it is spelled alike."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from uld_adapters.vocabulary.cover import Covers, Overhang
from uld_adapters.vocabulary.outcome import CROWD, Event, Outcomes
from uld_adapters.vocabulary.tally import Tally, any_of
from uld_adapters.vocabulary.weigher import Weigher

Path = tuple[int, ...]
YES, NOW, MAY = range(3)
OWN, ASTRAY = -1, -2  # instead of a number of bytes
_NONE = np.array([], dtype=np.int64)


class Part(NamedTuple):
    """Tokens after a path, whose mass counts `to` yes, now or may.

    Each begins with `skip` bytes that are in the text already; or it is the last one of the candidate's own spelling, or they begin
    spellings astray.
    """

    ids: Int[np.ndarray, " n"]
    to: int
    skip: int


class Own(NamedTuple):
    """The token that ends a candidate's own spelling, and the first bytes of tokens after which the outcome may be otherwise.

    As long as nobody reads on, all of its mass stays open, and under the uniform model the share `open`.
    """

    token: int
    hits: int
    open: float


class Block(NamedTuple):
    """The parts after a path, side by side: their tokens, and of each how many, `to`, and whether heavy ones are looked at.

    Of a `crowd` of so many tokens only may count, but for those that are `ending` now, and nobody looks at any of them. The first part
    is the token `own`, unless nothing can change the outcome then. The tokens of the last part lead the `ways` astray.
    """

    path: Path
    parts: Sequence[Part]
    ids: Int[np.ndarray, " tokens"]
    told: Int[np.ndarray, "parts 3"]
    own: Own | None = None
    ways: Sequence[Path] = ()
    crowd: int = 0
    ending: Int[np.ndarray, " n"] = _NONE


@dataclass(frozen=True, eq=False)
class Plan:
    """A candidate's spellings: `exact` ones, to which the paths `below` lead, and `overhangs` of its `size` bytes.

    `astray` are overhangs away from there, by the path up to the token that leads away. `blocks` are what is to be gathered.
    """

    event: Event
    data: bytes
    size: int
    exact: Sequence[Path] = ()
    overhangs: Sequence[Overhang] = ()
    below: Sequence[Path] = ()
    astray: Mapping[Path, Sequence[Overhang]] = field(default_factory=dict)
    blocks: Sequence[Block] = ()

    @property
    def undecided(self) -> Iterator[Path]:
        """Its own spellings of which it depends on what follows whether they count."""
        return ((*block.path, block.own.token) for block in self.blocks if block.own)

    def each(self, weigher: Weigher, base: Path, tally: Tally) -> None:
        """Count its mass with a look at each spelling, below a path that spells what is before it."""
        for path in self.exact:
            weigher.leaf(self.event, base + path, self.data, weigher.weight(base + path), tally)
        for overhang in self.overhangs:
            self.beyond(weigher, base, overhang, tally)

    def beyond(self, weigher: Weigher, base: Path, overhang: Overhang, tally: Tally) -> None:
        """Count the mass of one overhang."""
        weigher.tokens(self.event, base + overhang.path, overhang.ids, self.size - overhang.at, self.data, tally)


Planned = tuple[Plan, Sequence[Path]]  # and the paths below which it counts
NOTHING = Plan(Event(b"", b"", None), b"", 0)


def closing(token: int) -> Plan:
    """The plan of a control token whose counterpart is this one."""
    return replace(NOTHING, blocks=[_block((), [Part(np.array([token]), YES, OWN)], None)])


def make_plan(outcomes: Outcomes, small: Covers, event: Event, tail: bytes, data: bytes) -> Plan:
    """The plan of the token that an event has, which is spelled with these bytes after the small model's tail."""
    size = len(tail) + len(data)
    exact, overhangs = small.paths(tail + data), small.overhangs(tail + data)
    below = dict.fromkeys(path[:at] for path in exact for at in range(len(path)))
    ends = [*small.paths(tail), *(overhang.path for overhang in small.overhangs(tail))]
    here = below.keys() | {path[:at] for path in ends for at in range(len(path) + 1)}
    parts: dict[Path, list[Part]] = defaultdict(list)
    now, certain = outcomes.judge(event, data)
    if now or not certain:
        for path in filter(None, exact):
            parts[path[:-1]].append(Part(np.array(path[-1:]), YES if certain else NOW if now else MAY, OWN))
    crowds: dict[Path, tuple[int, Int[np.ndarray, " n"]]] = {}
    astray: dict[Path, list[Overhang]] = defaultdict(list)
    for overhang in overhangs:
        path, at, ids = overhang
        if path not in here:
            astray[next(path[:end] for end in range(1, len(path) + 1) if path[:end] not in here)].append(overhang)
            continue
        ending, others = outcomes.ending(event, data, size - at, ids)
        if ids.size > CROWD:
            crowds[path] = ids.size, ending
        else:
            parts[path] += [Part(some, to, size - at) for some, to in ((ending, NOW), (others, MAY)) if some.size]
    ways: dict[Path, list[Path]] = defaultdict(list)
    for way in astray:
        ways[way[:-1]].append(way)
    for path, some in ways.items():
        parts[path].append(Part(np.array([way[-1] for way in some]), MAY, ASTRAY))
    hits = outcomes.hitters(event, data)
    own = {path[:-1]: Own(path[-1], hits.firsts, outcomes.hit(event, data) if now else 1.0) for path in exact if path and not certain}
    blocks = [_block(path, parts[path], own.get(path), ways[path], *crowds.get(path, (0, _NONE))) for path in {**parts, **crowds}]
    return Plan(event, data, size, exact, overhangs, [path for path in below if path], dict(astray), blocks)


def _block(path: Path, parts: Sequence[Part], *others: Any) -> Block:
    told = np.array([(part.ids.size, part.to, part.skip != OWN) for part in parts], dtype=np.int64).reshape(-1, 3)
    return Block(path, parts, np.concatenate([_NONE, *(part.ids for part in parts)]), told, *others)


def strays(weigher: Weigher, asked: Sequence[Planned]) -> Iterator[Path]:
    """Paths astray that may be heavy and have no row."""
    ways: dict[Path, list[tuple[Path, Plan, Block]]] = defaultdict(list)
    for plan, bases in asked:
        for block in plan.blocks:
            if block.ways:
                for base in bases:
                    ways[base + block.path].append((base, plan, block))
    for path, group in ways.items():
        led = [(base, way, plan) for base, plan, block in group for way in block.ways]
        if path in weigher.rows:
            chances = weigher.rows[path].take(np.concatenate([block.parts[-1].ids for *_, block in group]), 1)
            led = [led[at] for at in any_of(chances >= weigher.least_after(path)).nonzero()[0].tolist()]
        for base, way, plan in led:
            for overhang in plan.astray[way]:
                astray = base + overhang.path
                if astray not in weigher.rows and weigher.heavy(astray):
                    yield astray
