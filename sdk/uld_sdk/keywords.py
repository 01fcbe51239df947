"""Keywords of the clients: spelled out in every signature, and a wrong one is answered with the nearest right one."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from uld_adapters.errors import UnknownName

Chosen = TypeVar("Chosen")
Call = TypeVar("Call", bound=Callable[..., Any])


def chosen(options: Callable[..., Chosen], given: Mapping[str, object], *, also: Iterable[str] = ()) -> Chosen:
    """Make a dataclass of options out of keywords; raises `UnknownName` for one that it lacks.

    `also` names what the caller takes apart from the options, so that a slip there is understood too.
    """
    known = [*inspect.signature(options).parameters, *also]
    for name in given:
        if name not in known:
            raise UnknownName("option", name, known)
    return options(**given)


def spelled(options: type[Any]) -> Callable[[Call], Call]:
    """Put the fields of a dataclass in the place of `**options`, for `help()`, editors and `inspect.signature`.

    The type checker reads the same names from the TypedDict in the annotation of `**options`.
    """
    fields = [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in inspect.signature(options).parameters.values()]

    def spell(call: Call) -> Call:
        signature = inspect.signature(call)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        call.__dict__["__signature__"] = signature.replace(parameters=[*own, *fields])
        call.__doc__ = "\n\n".join(inspect.cleandoc(text) for text in (call.__doc__, options.__doc__) if text)
        return call

    return spell
