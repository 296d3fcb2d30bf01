"""A plug-in's function called with the options that a user set for it, which are checked against its signature."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedtune.errors import InputError, UnknownNameError


def call(function: Callable[..., Any], options: dict[str, Any], what: str, table: str, *arguments: Any) -> Any:
    """What the function returns for the arguments and the options.

    `what` names the function and `table` the settings table of its options, both for error messages. InputError is
    raised for an option that the function does not take, for one of another type and for one that is missing.
    """
    parameters = _parameters(function, arguments, what)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in options.items():
        if key not in parameters and not takes_any:
            known = [f"{table}.{name}" for name in parameters] or ["none"]
            raise UnknownNameError(f"setting of the {what}", f"{table}.{key}", known)
        if key in parameters:
            _check_type(parameters[key].annotation, value, f"{table}.{key}")
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variadic and name not in options:
            raise InputError(f"the setting {table}.{name} is missing, the {what} needs it")
    return function(*arguments, **options)


def _parameters(function: Callable[..., Any], arguments: tuple[Any, ...], what: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of the function that its first `arguments` leave open."""
    partial = functools.partial(function, *arguments)
    try:
        return inspect.signature(partial, eval_str=True).parameters
    except NameError:  # an annotation that is imported for type checkers only
        return inspect.signature(partial).parameters
    except ValueError:  # the function does not take the arguments
        taken = ", ".join(type(argument).__name__ for argument in arguments)
        raise InputError(f"the {what} must be a function that takes ({taken}), got one that does not") from None


def _check_type(annotation: Any, value: Any, name: str) -> None:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value, strict=True)
    except PydanticUserError:  # an annotation that pydantic can't check
        return
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Input should be ").replace("an instance of Sequence", "a list")
        message = message.replace("'str' instances are not allowed as a Sequence value", "a list")
        raise InputError(f"{name} must be {message}, got {value!r}") from None
