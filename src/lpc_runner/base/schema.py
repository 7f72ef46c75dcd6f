"""Constructors are the schema: their annotations say which values they take, and `checked` enforces them.

    class Langevin:
        @checked
        def __init__(self, num_steps: Annotated[int, at_least(1, "no steps at all: sampler=none")]): ...

A value that does not fit raises `ValueError` with one line, `num_steps must be an integer of at least 1, got 0
(no steps at all: sampler=none)`; `lpc_runner.config` adds the group's name in front.

What a class offers beyond its constructor is a protocol (`inference.interfaces`, `tracking.tracker.Sink`); `declared`
reads what a part says, and the protocol's own answer where it says nothing.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}

_AS_TEXT = """what looks like a number or a list is text when quoted twice: 'key="value"'"""


def at_least(bound: float, hint: str = "") -> Any:
    """Annotation: value >= bound."""
    return Field(ge=bound, allow_inf_nan=False, title=f"of at least {bound}", description=hint or None)


def above(bound: float, hint: str = "") -> Any:
    """Annotation: value > bound."""
    return Field(gt=bound, allow_inf_nan=False, title=f"above {bound}", description=hint or None)


def between(low: float, high: float, hint: str = "") -> Any:
    """Annotation: low < value < high."""
    return Field(gt=low, lt=high, title=f"in ({low}, {high})", description=hint or None)


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, above(0)]


def describe(hint: Any) -> str:
    """The annotation in words: 'an integer of at least 1 or null'."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *metadata = typing.get_args(hint)
        titles = [field.title for field in metadata if getattr(field, "title", None)]
        return " ".join([describe(base), *titles])
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if origin in (list, tuple):
        return "a list"
    if origin is dict:
        return f"a mapping of names to {describe(typing.get_args(hint)[1])}"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def remedy(hint: Any) -> str:
    """The advice attached to an annotation, '' when there is none."""
    if typing.get_origin(hint) is Annotated:
        hints = [field.description for field in typing.get_args(hint)[1:] if getattr(field, "description", None)]
        return " ".join(hints)
    return next(filter(None, map(remedy, typing.get_args(hint))), "")


def constructor_of(target: Any) -> Any:
    """The function whose annotations describe `target`: a class's `__init__`, or the function itself."""
    return target.__init__ if inspect.isclass(target) else target


def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    function = inspect.unwrap(constructor_of(target))
    if function is object.__init__:
        return {}
    return {name: value for name, value in inspect.signature(function).parameters.items() if name != "self"}


def hints_of(target: Any) -> dict[str, Any]:
    """Annotations of a class's constructor or of a function, by parameter name; unannotated ones are `Any`."""
    parameters = _parameters(target)
    hints = typing.get_type_hints(inspect.unwrap(constructor_of(target)), include_extras=True) if parameters else {}
    return {name: hints.get(name, Any) for name, value in parameters.items() if value.kind not in _ANY_NUMBER}


def required_by(target: Any) -> list[str]:
    """Names that a constructor must be given."""
    return [name for name in hints_of(target) if _parameters(target)[name].default is inspect.Parameter.empty]


def accepted(target: Any, offered: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments offered, those that a constructor takes: all of them where it has **."""
    if any(value.kind is inspect.Parameter.VAR_KEYWORD for value in _parameters(target).values()):
        return offered
    return {name: value for name, value in offered.items() if name in hints_of(target)}


@functools.cache
def _adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=_STRICT)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError with one line when `value` does not fit the annotation `hint`."""
    if hint is Any:
        return
    try:
        _adapter(hint).validate_python(value)
    except pydantic.ValidationError:
        got = "null" if value is None else repr(value)
        hints = [remedy(hint), _AS_TEXT if "text" in describe(hint) and value is not None else ""]
        advice = "".join(f" ({hint})" for hint in hints if hint)
        raise ValueError(f"{name} must be {describe(hint)}, got {got}{advice}") from None


def checked(constructor: Any) -> Any:
    """Decorator for `__init__`: every argument is held against its annotation before the body runs."""

    @functools.wraps(constructor)
    def wrapper(self, *args: Any, **kwargs: Any) -> None:
        hints = hints_of(constructor)
        bound = inspect.signature(constructor).bind(self, *args, **kwargs)
        for name, value in bound.arguments.items():
            if name != "self":
                check_value(name, value, hints.get(name, Any))
        constructor(self, *args, **kwargs)

    return wrapper


def declared(part: Any, protocol: type, name: str) -> Any:
    """`part.name`; the protocol's default, bound to the part, where the part (an object or a class) has no such name.

    A class of one's own thus needs to define only what differs from the defaults, and need not inherit from anything.
    """
    if hasattr(part, name):
        return getattr(part, name)
    default = inspect.getattr_static(protocol, name)
    return default.__get__(part, protocol) if hasattr(default, "__get__") else default


def missing(part: Any, protocol: type) -> list[str]:
    """Methods that the protocol has no default for and `part`, an object or a class, does not offer."""
    return sorted(name for name in protocol.__abstractmethods__ if not hasattr(part, name))
