"""Backends by name: the built-in ones, and those of installed packages (entry-point group `uld_sdk.backends`)."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from uld_adapters.backend import Backend
from uld_adapters.errors import UnknownName

GROUP = "uld_sdk.backends"
Factory = Callable[..., Backend]


def _hf(**options: Any) -> Backend:
    from uld_adapters.huggingface import HuggingFaceBackend

    return HuggingFaceBackend(**options)


def _tgi(**options: Any) -> Backend:
    from uld_adapters.tgi import TGIBackend

    return TGIBackend(**options)


def _vllm(**options: Any) -> Backend:
    from uld_adapters.vllm import VLLMBackend

    return VLLMBackend(**options)


def _llamacpp(**options: Any) -> Backend:
    from uld_adapters.llamacpp import LlamaCppBackend

    return LlamaCppBackend(**options)


def _openai(*, route: str = "chat", **options: Any) -> Backend:
    from uld_adapters.openai.chat import ChatBackend
    from uld_adapters.openai.completions import CompletionsBackend

    routes = {"chat": ChatBackend, "completions": CompletionsBackend}
    if route not in routes:
        raise UnknownName("route", route, routes)
    return routes[route](**options)


_BUILT_IN: dict[str, Factory] = {"hf": _hf, "tgi": _tgi, "vllm": _vllm, "llamacpp": _llamacpp, "openai": _openai}


def backend_names() -> list[str]:
    """All names that `create_backend` knows, built-in and installed."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def create_backend(name: str, **options: Any) -> Backend:
    """Make the backend registered under a name; raises UnknownName with the nearest names."""
    if name in _BUILT_IN:
        return _BUILT_IN[name](**options)
    for point in entry_points(group=GROUP):
        if point.name == name:
            factory: Factory = point.load()
            return factory(**options)
    raise UnknownName("backend", name, backend_names())
