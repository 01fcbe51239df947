"""What an option's value must be, told in the words of the option that has another."""

from numbers import Integral, Real
from pathlib import Path
from typing import Any

from uld_adapters.errors import UsageError


def paths_of(options: object, name: str, *, inside: bool = False) -> tuple[str | Path | None, ...]:
    """One path or several as a tuple; None among them only with `inside`."""
    value = getattr(options, name)
    if value is None:
        return ()
    several = value if isinstance(value, list | tuple) else (value,)
    if not several or not all(isinstance(each, str | Path) or (inside and each is None) for each in several):
        raise UsageError(f"{name} is {value!r}, neither a path nor a list of paths", hint=f"pass {name} as a folder, or leave it out")
    return tuple(several)


def _checked(options: object, name: str, kind: type, words: str, *, optional: bool = False) -> Any:
    value = getattr(options, name)
    if value is None and optional:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{name} is {value!r}, not {words}", hint=f"pass {name} as {words}{', or leave it out' if optional else ''}")
    return value


def check_whole(options: object, name: str, *, optional: bool = False) -> None:
    """Refuse what is no whole number, and make a Python one of it; raises `UsageError`."""
    value = _checked(options, name, Integral, "a whole number", optional=optional)
    object.__setattr__(options, name, None if value is None else int(value))  # numpy's are no JSON


def check_number(options: object, name: str, *, optional: bool = False) -> None:
    """Refuse what is no number, and make a float of it; raises `UsageError`."""
    value = _checked(options, name, Real, "a number", optional=optional)
    object.__setattr__(options, name, None if value is None else float(value))


def check_text(options: object, name: str, *, optional: bool = False) -> None:
    """Refuse what is no text; raises `UsageError`."""
    _checked(options, name, str, "text", optional=optional)


def check_flag(options: object, name: str) -> None:
    """Refuse what is neither True nor False; raises `UsageError`."""
    _checked(options, name, bool, "True or False")
