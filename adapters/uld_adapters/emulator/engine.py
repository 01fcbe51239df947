"""The model under the emulator: next-token log-probabilities, one pass at a time, remembered by prefix."""

import asyncio
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from uld_adapters.gguf_file import is_gguf
from uld_adapters.vocabulary.tokens import load_tokenizer

Row = Float[np.ndarray, " vocab"]
MEMO_BYTES = 2**30  # 5,000 positions of a vocabulary of 50,000


def load_model(source: str | Path) -> Any:
    """A causal model in float32 from a folder, a GGUF file or a hub name, ready for inference."""
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(source)
    if is_gguf(path):
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    return model.eval()


class Session:
    """One request's ids and key-value cache; `digest` names the ids, so that equal prefixes meet in the memo."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.cache: Any = None
        self.cached = 0
        self.digest = b""
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Go on after this token; digest_n = BLAKE2b-128(digest_(n-1), token_n)."""
        self.ids.append(token)
        self.digest = hashlib.blake2b(self.digest + token.to_bytes(4, "little"), digest_size=16).digest()


class Engine:
    """log p_M(. | prefix) of a causal model in nats, as float32 rows over its whole vocabulary.

    One thread runs the model, so passes never overlap and the event loop stays free. Rows are kept under their prefix,
    the least recently used going first, so within one engine a prefix always has the same values.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "model", memo: bool = True, memo_bytes: int = MEMO_BYTES) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.rows = int(model.get_output_embeddings().weight.shape[0])
        self.context = int(getattr(model.config, "max_position_embeddings", 2048))
        declared = getattr(model.generation_config, "eos_token_id", None)
        declared = declared if isinstance(declared, list) else [declared, tokenizer.eos_token_id]
        self.end_ids = frozenset(int(i) for i in declared if i is not None)
        self.special_ids = frozenset(int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.passes = 0
        self._short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._capacity = memo_bytes // (4 * self.rows) if memo else 0
        self._memo: OrderedDict[bytes, Row] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="emulator-model")

    @classmethod
    def load(cls, model: Any, *, tokenizer: Any = None, memo: bool = True, memo_bytes: int = MEMO_BYTES) -> "Engine":
        """Load what is given by name; a model object needs its tokenizer beside it."""
        kept: dict[str, Any] = {"memo": memo, "memo_bytes": memo_bytes}
        if isinstance(model, str | Path):
            name = Path(model).stem if str(model).endswith(".gguf") else Path(model).name
            return cls(load_model(model), load_tokenizer(tokenizer if tokenizer is not None else model), name=name, **kept)
        source = tokenizer if tokenizer is not None else model.config.name_or_path
        return cls(model.eval(), load_tokenizer(source), name=Path(model.config.name_or_path).name or "model", **kept)

    async def next(self, session: Session) -> Row:
        """Log p_M of every token after the session's ids."""
        row = self._memo.get(session.digest)
        if row is not None:
            self._memo.move_to_end(session.digest)
            return row
        digest = session.digest
        row = await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, session)
        if self._capacity:
            self._memo[digest] = row
            while len(self._memo) > self._capacity:
                self._memo.popitem(last=False)
        return row

    async def prompt(self, ids: Sequence[int]) -> Float[np.ndarray, "tokens vocab"]:
        """Log p_M after each of the ids, in one pass."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._forward_all, list(ids))

    def _forward(self, session: Session) -> Row:
        import torch

        with torch.inference_mode():
            fresh = torch.tensor([session.ids[session.cached :]], device=self.model.device)  # (1, tokens)
            out = self.model(input_ids=fresh, past_key_values=session.cache, use_cache=True, **self._short)
            session.cache, session.cached = out.past_key_values, len(session.ids)
            self.passes += 1
            return out.logits[0, -1].float().log_softmax(-1).cpu().numpy()

    def _forward_all(self, ids: list[int]) -> Float[np.ndarray, "tokens vocab"]:
        import torch

        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False)
            self.passes += 1
            return out.logits[0].float().log_softmax(-1).cpu().numpy()
