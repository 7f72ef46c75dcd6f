"""Constructors are the schema: their annotations say which values they take, and `checked` enforces them.

    class Langevin:
        @checked
        def __init__(self, num_steps: Annotated[int, at_least(1, "no steps at all: sampler=none")]): ...

A value that does not fit raises `ValueError` with one line, `num_steps must be an integer of at least 1, got 0
(no steps at all: sampler=none)`; `lpc_runner.config` adds the group's name in front.

A constructor that adds to its base's takes the rest as **, which the schema reads as the base's parameters.

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
        return f"a list, each {describe(typing.get_args(hint)[0])}"
    if origin is dict:
        return f"a mapping of names to {describe(typing.get_args(hint)[1])}"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def remedy(hint: Any) -> str:
    """The advice attached to an annotation, '' when there is none."""
    if typing.get_origin(hint) is Annotated:
        hints = [field.description for field in typing.get_args(hint)[1:] if getattr(field, "description", None)]
        return " ".join(hints)
    return next(filter(None, map(remedy, typing.get_args(hint))), "")


def _constructors(target: Any) -> list[Any]:
    """The functions whose annotations describe `target`, a class or a function.

    Of a class its `__init__`; where that takes a ** (what it passes on), the next base's that has one after it.
    """
    if not inspect.isclass(target):
        return [inspect.unwrap(target)]
    constructors = []
    for owner in target.__mro__:
        if "__init__" in vars(owner) and owner is not object:
            constructors.append(inspect.unwrap(owner.__init__))
            if not _takes_any(constructors[-1]):
                break
    return constructors


def _takes_any(function: Any) -> bool:
    return any(value.kind is inspect.Parameter.VAR_KEYWORD for value in inspect.signature(function).parameters.values())


def _parameters(target: Any) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Parameters and annotations by name, a base's first, without * and **; unannotated ones are `Any`."""
    parameters: dict[str, tuple[inspect.Parameter, Any]] = {}
    for function in reversed(_constructors(target)):
        hints = typing.get_type_hints(function, include_extras=True)
        for name, value in inspect.signature(function).parameters.items():
            if name != "self" and value.kind not in _ANY_NUMBER:
                parameters[name] = value, hints.get(name, Any)
    return parameters


def hints_of(target: Any) -> dict[str, Any]:
    """Annotations of a class's constructor or of a function, by parameter name; unannotated ones are `Any`.

    A constructor with a ** has the parameters of its base's constructor too.
    """
    return {name: hint for name, (_, hint) in _parameters(target).items()}


def required_by(target: Any) -> list[str]:
    """Names that a constructor must be given."""
    return [name for name, (value, _) in _parameters(target).items() if value.default is inspect.Parameter.empty]


def accepted(target: Any, offered: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments offered, those that a constructor takes: all of them where no base says what its ** are."""
    constructors = _constructors(target)
    if constructors and all(map(_takes_any, constructors)):
        return offered
    taken = _parameters(target)
    return {name: value for name, value in offered.items() if name in taken}


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


def missing(part: Any, protocol: type) -> str:
    """Methods that the protocol has no default for and `part`, an object or a class, lacks, in words; '' if none."""
    names = sorted(name for name in protocol.__abstractmethods__ if not hasattr(part, name))
    return f"no {' and no '.join(names)}, which {protocol.__module__}.{protocol.__name__} asks for" if names else ""
