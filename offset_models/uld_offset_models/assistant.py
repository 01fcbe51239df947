"""The small model of ULD: a base cut to its first layers, a LoRA adapter on it, and a gate over its logits."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from uld_adapters.errors import UsageError
from uld_adapters.gguf_file import is_gguf
from uld_adapters.vocabulary.tokens import load_tokenizer, rows_of
from uld_offset_models.adapter_batch import Parts
from uld_offset_models.gguf_model import load_gguf_model, truncate_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_WEIGHTS = "*.safetensors"
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_CONFIG = ("config.json",)
_LOGIT_CHANGERS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Gate(torch.nn.Module):
    """c(x) = sigmoid(w . h / rms(h) + b), one scalar a position; the assistant's logits are c * W h. Our own addition to ULD.

    w = 0 and b = -3 at the start, so every c is .047 and the assistant nearly uniform. `hidden` is the state after the final norm.
    """

    def __init__(self, width: int, *, bias: float = -3.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
        self.bias = torch.nn.Parameter(torch.full((), bias))

    def forward(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions"]:
        """The gate of each position, in (0, 1) and at least float32."""
        values = hidden.to(self.weight.dtype)
        scale = values.square().mean(-1, keepdim=True).add(1e-12).rsqrt()
        return torch.sigmoid((values * scale) @ self.weight + self.bias)


@dataclass
class SmallModel:
    """Everything inference needs; of an artifact that is loaded alone, LoRA is already merged.

    `backbone` gives `.last_hidden_state` after the final norm; `head` holds the real rows of the output embedding (rows, width),
    over which the uniform distribution u is defined; without a gate c = 1. Models that share a backbone have the head in common, too;
    where their adapters differ, `parts` says whose rows a batch holds, and `adapter` is the place of this model's own.
    """

    backbone: torch.nn.Module
    head: Tensor
    gate: Gate | None
    tokenizer: "PreTrainedTokenizerFast"
    parts: Parts | None = None
    adapter: int = 0

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions rows"]:
        """c(h) * W h for final hidden states."""
        if self.gate is not None:
            hidden = hidden * self.gate(hidden).unsqueeze(-1).to(hidden.dtype)
        return hidden @ self.head.T


def load_base(
    base: str | Path, *, layers: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """The first `layers` layers of a causal model (embeddings, final norm and head kept) and its tokenizer.

    `base` is a local folder, a hub name or a .gguf file. Raises `UsageError` for what cannot be loaded.
    """
    path = resolve_base(base)
    if is_gguf(path):
        model = load_gguf_model(path, layers=layers, dtype=dtype)
        tokenizer = load_base_tokenizer(path)
    else:
        from transformers import AutoModelForCausalLM

        tokenizer = load_base_tokenizer(path)
        config = _config(base, path, layers)
        with _loading(base), _quiet():  # the layers left out are meant to be unused
            model = AutoModelForCausalLM.from_pretrained(str(path), config=config, dtype=dtype, use_safetensors=True)
    if changed := [name for name in _LOGIT_CHANGERS if getattr(model.config, name, None) not in (None, 1, 1.0)]:
        raise UsageError(f"{base} changes its logits after the head ({', '.join(changed)})", hint="choose a base with a plain linear head")
    model.requires_grad_(False)
    model.config.use_cache = True
    return model.to(device).eval(), tokenizer


def check_base(base: str | Path, *, layers: int | None = None) -> None:
    """Refuse a base that is not there, or has not so many layers, without its weights; raises `UsageError`."""
    path = resolve_base(base, files=_CONFIG)
    if not is_gguf(path):
        _config(base, path, layers)


def _config(base: str | Path, path: Path, layers: int | None) -> Any:
    from transformers import AutoConfig

    with _loading(base):
        config = AutoConfig.from_pretrained(str(path))
    truncate_config(config, layers)
    return config


@contextmanager
def _loading(base: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"no causal language model could be loaded from {base}: {str(error).splitlines()[0]}",
            hint="--base needs a folder with config.json and *.safetensors, a hub name or a .gguf file",
        ) from error


def load_base_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a resolved base."""
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(path)
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer of {path} is not a fast one", hint="convert it to tokenizer.json first")
    return tokenizer


def resolve_base(base: str | Path, *, files: Sequence[str] = _HUB_FILES) -> Path:
    """The local folder or GGUF file behind `base`; of a hub name these files are fetched (weights as safetensors only)."""
    path = Path(base).expanduser()
    if path.exists():
        return path
    if path.suffix == ".gguf" or path.is_absolute() or str(base).startswith((".", "~")) or str(base).count("/") > 1:
        raise UsageError(f"the base {base} does not exist", hint="--base takes a folder, a .gguf file or a hub name such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(base), allow_patterns=list(files)))
    except Exception as error:  # offline, unknown and gated repositories raise unrelated classes
        raise UsageError(
            f"the base {base} is neither a local path nor a hub model that can be fetched ({type(error).__name__})",
            hint="check the spelling, or download the model and give its folder",
        ) from error


def base_fingerprint(base: str | Path) -> str:
    """SHA-256 of the weights: of the GGUF file, or over the names and contents of all safetensors files in order."""
    path = resolve_base(base)
    if path.is_file():
        return file_sha256(path)
    files = sorted(path.glob(_WEIGHTS))
    if not files:
        raise UsageError(f"{base} holds no safetensors weights", hint="save the model with safe_serialization")
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(f"{f.name} {file_sha256(f)}\n" for f in files).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def real_rows(model: Any, tokenizer: Any) -> Tensor:
    """The rows of the output embedding that stand for tokens: padding rows beyond the tokenizer are left out."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UsageError("the base's output head has a bias", hint="choose a base with a plain linear head")
    rows = rows_of(tokenizer)
    if head.weight.shape[0] < rows:
        raise UsageError(
            f"the tokenizer has {rows} tokens but the base's head only {head.weight.shape[0]} rows", hint="use the base's own tokenizer"
        )
    return head.weight.detach()[:rows]


@contextmanager
def tolerating_peft() -> Iterator[None]:
    """Hide what peft 0.21 provokes: it reads names that transformers has deprecated, and that is not the caller's to act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
