"""What the target says of one row, as bytes: ids in as few bytes as they need, log-probabilities in steps of 1/2048 nat.

Rounding moves a log-probability by at most 1/4096 nat. Rows where one lies below -31.9 nats are kept in float32 instead, and so are
the label's own and the tail mass everywhere. Bytes of one rank stand together, for deflate to find what they share.
"""

import struct
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from uld_adapters.errors import MalformedAnswer
from uld_adapters.logprobs import Score

STEP = 1 / 2048  # nats
_LOWEST = -31.9  # nats; 65535 steps reach -31.999
_HEADER = struct.Struct("<IIBBBx")  # positions, k, bytes of an id (0: all ids in order), bytes of a log-probability, complete


@dataclass(frozen=True)
class TargetLogprobs:
    """What the target says at the n answer positions of a row, the end token's among them.

    `ids[i]` are the k tokens that it reports at position i and `logprobs[i]` their log p_M in nats: most probable first, or in the order
    of the ids where the distribution is `complete`. `label[i]` is log p_M of the row's own token, NaN where the server would not say:
    then it lies outside of K and is at most the last of `logprobs[i]`. `tail[i]` is the mass of all other tokens, m = 1 - sum_K p_M.
    """

    ids: Int[np.ndarray, "n k"]
    logprobs: Float[np.ndarray, "n k"]
    label: Float[np.ndarray, " n"]
    tail: Float[np.ndarray, " n"]
    complete: bool = False

    @classmethod
    def from_score(cls, score: Score) -> "TargetLogprobs":
        """Out of a backend's score; raises `MalformedAnswer` where the server reported more at one position than at another.

        Where it named tokens that nobody can tell from others, all of the text has as many as can be told everywhere.
        """
        tops = score.positions
        if any(top.neutral for top in tops):
            tops = tuple(top.first(min(each.ids.size for each in tops)) for top in tops)
        if len({(top.ids.size, top.complete) for top in tops}) != 1:
            raise MalformedAnswer(
                f"the server reported {', '.join(sorted({str(top.ids.size) for top in tops}))} log-probabilities at positions of one text"
            )
        ids, logprobs = np.stack([top.ids for top in tops]), np.stack([top.logprobs for top in tops])
        if complete := tops[0].complete:
            order = np.argsort(ids, axis=1)
            ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
        tail = np.array([top.tail_mass for top in tops])
        return cls(ids.astype(np.int32), logprobs.astype(np.float32), score.logprobs.astype(np.float32), tail.astype(np.float32), complete)


def pack(values: TargetLogprobs) -> bytes:
    """The bytes of a row; `unpack` gives the values back, log-probabilities to 1/4096 nat."""
    n, k = values.ids.shape
    in_order = values.complete and bool((values.ids == np.arange(k)).all())
    id_type = np.dtype("<u2" if values.ids.max(initial=0) < 1 << 16 else "<u4")
    fixed = bool((values.logprobs >= _LOWEST).all() and (values.logprobs < STEP / 2).all())
    columns = [values.label.astype("<f4"), values.tail.astype("<f4")]
    columns.append(np.rint(values.logprobs.T.astype(np.float64) / -STEP).astype("<u2") if fixed else values.logprobs.T.astype("<f4"))
    if not in_order:
        columns.append(values.ids.T.astype(id_type))
    header = _HEADER.pack(n, k, 0 if in_order else id_type.itemsize, 2 if fixed else 4, values.complete)
    return header + b"".join(_by_byte(column) for column in columns)


def unpack(data: bytes | memoryview) -> TargetLogprobs:
    """What `pack` packed."""
    n, k, id_size, value_size, complete = _HEADER.unpack_from(data)
    at = _HEADER.size

    def column(kind: str, *shape: int) -> np.ndarray:
        nonlocal at
        size = np.dtype(kind).itemsize
        count = int(np.prod(shape))
        planes = np.frombuffer(data, np.uint8, count * size, at).reshape(size, count)
        at += count * size
        return np.ascontiguousarray(planes.T).view(kind).reshape(shape)

    label, tail = column("<f4", n), column("<f4", n)
    stored = column("<u2" if value_size == 2 else "<f4", k, n).T
    logprobs = stored.astype(np.float32) * np.float32(-STEP) if value_size == 2 else stored.astype(np.float32)
    ids = column(f"<u{id_size}", k, n).T.astype(np.int32) if id_size else np.broadcast_to(np.arange(k, dtype=np.int32), (n, k))
    return TargetLogprobs(ids, logprobs, label, tail, bool(complete))


def _by_byte(column: np.ndarray) -> bytes:
    """All first bytes, then all second ones."""
    flat = np.ascontiguousarray(column).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, column.itemsize).T.tobytes()
