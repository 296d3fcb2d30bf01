"""What holds for all tests: one thread a process, examples may take their time, and the checks of types cost little."""

import inspect
import os
from typing import ForwardRef, get_args

import jaxtyping
from hypothesis import settings

# For torch, which is imported later, here and in the processes that tests start: the test processes already use all
# cores, and the threads of one would only wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes depends on what else the machine does.
settings.register_profile("fedtune", deadline=None)
settings.load_profile("fedtune")

check_axes = jaxtyping.jaxtyped


def check(*, typechecker):
    """A decorator that checks types, and the axes of arrays if the function names any.

    Without arrays jaxtyping adds nothing to the type checker, but takes more time than most functions do.
    """

    def decorate(subject):
        if inspect.isfunction(subject) and not needs_jaxtyping(subject):
            return typechecker(subject)
        return check_axes(typechecker=typechecker)(subject)

    return decorate


def needs_jaxtyping(function):
    """Whether an annotation has axes, or a name in quotes: jaxtyping lets names pass that exist for mypy alone."""
    return any(map(has_axes_or_quotes, function.__annotations__.values()))


def has_axes_or_quotes(annotation):
    """Looks into generic types too."""
    if isinstance(annotation, list | tuple):  # the arguments of a Callable
        return any(map(has_axes_or_quotes, annotation))
    in_itself = isinstance(annotation, str | ForwardRef) or getattr(annotation, "__module__", "") == "jaxtyping"
    return in_itself or any(map(has_axes_or_quotes, get_args(annotation)))


jaxtyping.jaxtyped = check  # --jaxtyping-packages puts this decorator on every function
