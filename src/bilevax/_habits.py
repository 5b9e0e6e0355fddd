"""Words that people know from other libraries, and what they are called here."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

# Words of one meaning, and ours for it: the first of these that a function has is meant.
_MEANINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        (
            "maxiter maxiters max_iter max_iters max_iterations n_iter num_iter num_iters niter "
            "iterations num_iterations steps n_steps nsteps epochs"
        ),
        ("max_steps", "num_steps"),
    ),
    ("tol tolerance ftol gtol xtol eps epsilon", ("rtol", "atol")),
    (
        "lr learning_rate step_size stepsize outer_lr inner_lr step optim opt",
        ("step_size", "optimizer"),
    ),
    ("solver solve inner_optimizer linsolve inner", ("inner_solver", "linear_solver")),
    ("adjoint rule hypergradient diff estimator", ("rule", "hypergradient")),
    ("init x_init init_params params init_x start", ("x0", "x", "theta0", "theta")),
    ("verbose disp display", ("progress",)),
    ("data", ("inner_data",)),
    ("precond M", ("preconditioner",)),
)
_WORDS = {word: ours for words, ours in _MEANINGS for word in words.split()}
# Where a function has none of ours: the object that has.
_OBJECTS: dict[str, str] = {
    "max_steps": (
        "bx.NewtonCG and bx.LBFGS go on until they have converged or cannot; a limit of inner "
        "steps is that of bx.Optimistix(solver, max_steps=...) or of "
        "bx.Descent(optimizer, num_steps=...)"
    ),
    "rtol": "Tolerances belong to the solver: inner_solver=bx.NewtonCG(rtol=...)",
    "step_size": (
        "The step size belongs to an Optax optimiser: bx.DoubleLoop(optimizer=optax.adam(0.1)) "
        "for theta, bx.Descent(optax.sgd(0.1), num_steps=...) for x"
    ),
}
# What is another object, by function and keyword.
_OTHERS = {
    ("bx.Implicit", "rtol"): "A hypergradient to an accuracy is bx.Accurate(rtol)",
    ("bx.Implicit", "polish"): "A hypergradient after a Newton step is bx.Polished()",
}
_OPTIMIZER = "optimizer=optax.adam(...), an Optax optimiser with its step size"

_FOREIGN_NAMES = {
    "custom_root": "bx.argmin(bx.Root(fn), bx.Given()), called with the solution and theta",
    "custom_fixed_point": "bx.argmin(bx.FixedPoint(fn), bx.Given()), called with the solution "
    "and theta",
    "root": "bx.argmin(bx.Root(fn))",
    "fixed_point": "bx.argmin(bx.FixedPoint(fn))",
    "minimize": "bx.argmin(fn) for the inner problem, bx.solve(problem, x0, theta0) for both",
    "minimise": "bx.argmin(fn) for the inner problem, bx.solve(problem, x0, theta0) for both",
    "grad": "bx.hypergradient(problem, x0, theta)",
}


def explain_name(name: str, top: dict[str, Any], homes: dict[str, dict[str, Any]]) -> str:
    """What to say where the package has no attribute `name`, which one of its `homes` may have."""
    said = f"module 'bilevax' has no attribute {name!r}."
    if name in _FOREIGN_NAMES:
        return f"{said} Here it is {_FOREIGN_NAMES[name]}."
    places = {other: f"bx.{other}" for other in top if not other.startswith("_")}
    for home, names in homes.items():
        places |= {other: f"bx.{home}.{other}" for other in names if not other.startswith("_")}
    lower = {other.lower(): place for other, place in places.items()}
    near = difflib.get_close_matches(name, places, n=1)
    near = [places[near[0]]] if near else []
    near = near or [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=1)]
    return f"{said} Did you mean {near[0]}?" if near else said


def explain_keywords(namespace: Any, prefix: str) -> None:
    """Let the public functions and classes name their own word for an unknown keyword."""
    for name, value in list(namespace.items()):
        is_ours = getattr(value, "__module__", "").startswith("bilevax")
        if name.startswith("_") or not is_ours:
            continue
        if isinstance(value, FunctionType):
            namespace[name] = _explaining(value, f"{prefix}{name}")
        elif isinstance(value, type) and isinstance(vars(value).get("__init__"), FunctionType):
            value.__init__ = _explaining(value.__init__, f"{prefix}{name}")


def _explaining(fn: Callable, name: str) -> Callable:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except TypeError as error:
            # An error inside the function has another frame below this one.
            is_call = error.__traceback__ is not None and error.__traceback__.tb_next is None
            found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not (is_call and found):
                raise
            parameters = [p for p in inspect.signature(fn).parameters if p != "self"]
            raise TypeError(_explain_keyword(name, found[1], parameters)) from None

    return wrapper


def _explain_keyword(name: str, word: str, parameters: list[str]) -> str:
    said = f"{name} has no keyword `{word}`."
    ours = _WORDS.get(word, ())
    known = [p for p in ours if p in parameters]
    near = difflib.get_close_matches(word, parameters, n=1)
    if (name, word) in _OTHERS:
        said += f" {_OTHERS[name, word]}."
    elif known == ["optimizer"]:
        said += f" Here it is {_OPTIMIZER}."
    elif known:
        said += f" Here it is called {' or '.join(f'`{p}`' for p in known)}."
    elif ours and ours[0] in _OBJECTS:
        said += f" {_OBJECTS[ours[0]]}."
    elif near:
        said += f" Did you mean `{near[0]}`?"
    return f"{said} It has: {', '.join(parameters)}."
