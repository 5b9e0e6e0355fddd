"""`solve`: the only outer loop. Compiled in chunks; between chunks it talks to the person."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._checks import check_positive
from ._hypergradient._base import AbstractHypergradient
from ._hypergradient._entry import check_types, explained, is_unexplained
from ._hypergradient._locate import locate
from ._outer._base import AbstractMethod
from ._outer._best import choose
from ._outer._chunk import MAX_CHUNK, REASONS, columns, copied, init_method, run_chunk
from ._outer._double_loop import DoubleLoop
from ._problem import Bilevel, as_arrays, bind, restore, start_as_arrays
from ._reach._traced import refuse_traced
from ._report._history import COUNTS, History, joined
from ._report._interrupt import Interrupt
from ._report._progress import Progress, progress_bar
from ._report._solution import BestEvaluation, Solution, num_rows
from ._results import RESULTS, SolveError
from ._tree import debugged

_MAX_FINAL_EVALUATIONS = 5
_INSTEAD = (
    "Several starts or settings: loop over them in Python, which compiles once. An outer loop "
    "inside jit or vmap: bx.hypergradient(problem, x0, theta, state=state, throw=False) and an "
    "Optax update, in jax.lax.scan. The derivative of the theta that is found: "
    "bx.argmin(value, bx.Given())(solution.theta, setting), where value(theta, setting) is the "
    "outer objective at bx.argmin(inner)."
)
_ANY = float(np.finfo(np.float32).max)  # a tolerance that every number meets
_CHUNK_SECONDS = 0.05  # seldom enough to cost nothing, often enough for a person


def solve(
    problem: Bilevel,
    x0: PyTree,
    theta0: PyTree,
    method: AbstractMethod | None = None,
    *,
    rule: AbstractHypergradient | None = None,
    num_steps: int = 100,
    rtol: float = 0.0,
    atol: float = 0.0,
    callback: Callable[[Progress], Any] | None = None,
    callback_every: int = 1,
    progress: bool | None = None,
    throw: bool = False,
) -> Solution:
    """Minimise `L(x*(theta), theta)` over theta.

    **Arguments:**

    - `problem`: a `Bilevel`.
    - `x0`: where the first inner solve starts (and every one, without warm starts); may be
        a function of theta.
    - `theta0`: the first theta.
    - `method`: `bx.DoubleLoop()` by default.
    - `rule`: short for `method=bx.DoubleLoop(hypergradient=rule)`; with a `DoubleLoop` that
        leaves its rule open it goes into that. `bx.recommend(problem, x0, theta0).rule` is
        the one that the library would take.
    - `num_steps`: the most outer steps.
    - `rtol`, `atol`: stop when the hypergradient norm is at most
        `atol + rtol * (norm at theta0)`. By default all steps are made.
    - `callback`: called with a `Progress` after every `callback_every` steps; the run stops
        when it returns something true. The arrays it gets are its own.
    - `progress`: a progress bar; by default on a terminal only. `True` needs tqdm.
    - `throw`: raise `bx.SolveError` if the outcome is not successful. By default a run
        does not die: a flagged step is recorded, falls back (see `DoubleLoop`), and a
        warning at the end says so.

    Where the adjoint system of the default rule turns out to be singular, the run goes on
    with `bx.MinimumNorm()`, and `print(solution)` says so.

    Ctrl-C ends the run after the current chunk and returns the solution so far; a second
    Ctrl-C interrupts at once.

    **Returns:** a `Solution`; `print(solution)` and `solution.plot()` show it.

    The theta that is returned is the last one; `solution.best` is the best that was seen. A run
    that ends above its start is flagged as `not_improved`, and returns the best.

    **Cost:** `num_steps + 1` evaluations: the last one belongs to the theta after the last
    step. One compilation, none on a second call with data of the same shapes.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2),
            outer=lambda x, theta: jnp.sum((x - 0.5) ** 2),
        )
        solution = bx.solve(problem, jnp.zeros(3), -jnp.ones(3), num_steps=50)
        print(solution)
        ```
    """
    refuse_traced(
        "bx.solve",
        _INSTEAD,
        problem=problem,
        x0=x0,
        theta0=theta0,
        method=method,
        rule=rule,
        num_steps=num_steps,
        tolerances=(rtol, atol),
    )
    method = DoubleLoop() if method is None else method
    check_positive(num_steps, "num_steps")
    check_positive(callback_every, "callback_every")
    if not isinstance(method, AbstractMethod):
        raise TypeError(
            "`method` must be bx.DoubleLoop(...) or bx.MAID(...); got "
            f"{type(method).__name__}. An optimiser, an inner solver or a rule goes into it: "
            "bx.DoubleLoop(optimizer=...)."
        )
    if rule is not None:
        method = _with_rule(method, rule, problem)
    run = _Run(problem, x0, theta0, method)
    with Interrupt() as interrupt:
        stopped_by = run.loop(
            num_steps, (rtol, atol), callback, callback_every, progress, interrupt
        )
        run.finish()
    solution = run.solution(stopped_by)
    _report_failures(solution, throw)
    return solution


def _with_rule(method: AbstractMethod, rule: Any, problem: Bilevel) -> AbstractMethod:
    """The method with this rule."""
    if isinstance(rule, str):
        raise TypeError(f"rule must be a rule; got {rule!r}. bx.recommend(...).rule is one.")
    check_types(problem, rule)
    chosen = method.with_rule(rule)
    if chosen is None:
        raise ValueError(
            "solve(rule=...) is for bx.DoubleLoop(...) without a rule of its own; got "
            f"method={type(method).__name__}, which has one. Leave out one of the two."
        )
    return chosen


class _Run:
    """The state of one call of `solve` on the host."""

    def __init__(
        self, problem: Bilevel, x0: PyTree, theta0: PyTree, method: AbstractMethod
    ) -> None:
        check_types(problem)
        self.start_time = time.perf_counter()
        x0 = start_as_arrays(x0)
        self.given = problem, x0
        self.problem, self.x0, theta = bind(problem, x0, as_arrays(theta0))
        self.method = method
        self.state, self.best = init_method(self.problem, method, self.x0, theta)
        self.rows: list[dict[str, Any]] = []
        self.num_steps = 0
        self.num_rows = 0
        self.singular_since: int | None = None

    def loop(
        self,
        num_steps: int,
        tolerances: tuple[float, float],
        callback: Callable[[Progress], Any] | None,
        callback_every: int,
        progress: bool | None,
        interrupt: "Interrupt",
    ) -> str:
        """Chunks until something says stop; returns what did."""
        rtol, atol = tolerances
        tolerance, interval = atol, self.method.interval
        chunk, next_call = 1, callback_every
        bar = progress_bar(num_steps, progress)
        try:
            while self.num_steps < num_steps:
                began, before = time.perf_counter(), self.num_steps
                reason = self.advance(min(chunk * interval, num_steps - before), chunk, tolerance)
                seconds = (time.perf_counter() - began) / chunk
                last = self.rows[-1]
                done = self.num_steps - before
                bar.update(done, last["value"][-1], last["hypergradient_norm"][-1])
                if reason is not None:
                    return reason
                if callback is not None and self.num_steps >= next_call:
                    next_call = self.num_steps + callback_every
                    if callback(self.progress()):
                        return "callback"
                if interrupt.requested:
                    return "interrupt"
                if len(self.rows) == 1:
                    tolerance = atol + rtol * float(last["hypergradient_norm"][0])
                    is_good = RESULTS(last["result"][0]).name == "successful"
                    if is_good and last["hypergradient_norm"][0] <= tolerance:
                        return "tolerance"
                else:  # the first chunk took compilation with it
                    chunk = int(np.clip(_CHUNK_SECONDS / max(seconds, 1e-9), 1, MAX_CHUNK))
                wanted = num_steps if callback is None else min(num_steps, next_call)
                chunk = max(1, min(chunk, -(-(wanted - self.num_steps) // interval)))
                if self.method.needs_host or any(debugged()):  # each evaluation is looked at
                    chunk = 1
        finally:
            bar.close()
        return "num_steps"

    def finish(self) -> None:
        """Evaluate at the final theta; again, with warm starts, where that is flagged."""
        # A tolerance that every hypergradient meets stops at the first that is not flagged.
        num_evaluations = 1 if self.method.needs_host else _MAX_FINAL_EVALUATIONS
        self.advance(num_steps=0, num_evaluations=num_evaluations, tolerance=_ANY)

    def advance(self, num_steps: int, num_evaluations: int, tolerance: float) -> str | None:
        """One chunk; the reason to stop, if there is one."""
        if self.method.needs_host:
            self.state = self.method.on_host(self.problem, self.x0, self.state, num_steps == 0)
        args = (
            (self.state, self.best),
            self.problem,
            self.method,
            self.x0,
            jnp.asarray(self.num_rows, jnp.int32),
            jnp.asarray(num_steps, jnp.int32),
            jnp.asarray(num_evaluations, jnp.int32),
            jnp.asarray(tolerance, float),
        )
        begin = copied(self.state.x) if any(debugged()) else None
        try:
            (self.state, self.best), rows, known, count, reason = run_chunk(*args)
        except FloatingPointError:
            self._locate(begin, self.state.theta)
            raise
        rows, count, reason = jax.device_get((rows, count, reason))
        count, why = int(count), REASONS[int(reason)]
        if why == "singular":
            return self._go_over(rows, known, count, (num_steps, num_evaluations, tolerance))
        self._record(rows, known, count, num_steps)
        if begin is not None and RESULTS(self.rows[-1]["result"][-1]).name == "nonfinite":
            self._locate(begin, self.best.last.theta)
        return why

    def _go_over(
        self, rows: Any, known: tuple[str, ...], count: int, rest: tuple[int, int, float]
    ) -> str | None:
        """The last step met a singular system and moved nothing: go on with another rule."""
        num_steps, num_evaluations, tolerance = rest
        done = count - 1
        if done:
            self._record(rows, known, done, num_steps)
        method = self.method.for_singular()
        assert method is not None
        self.method = method
        self.singular_since = self.num_steps
        left = max(num_steps - done * method.interval, 0)
        return self.advance(left, num_evaluations - done, tolerance)

    def _record(self, rows: Any, known: tuple[str, ...], count: int, num_steps: int) -> None:
        """The first `count` rows of a chunk."""
        before = self.rows[-1]["seconds"][-1] if self.rows else 0.0
        now = time.perf_counter() - self.start_time
        row = columns(jax.tree_util.tree_map(lambda rows: rows[:count], rows), known)
        row["seconds"] = before + (now - before) * np.arange(1, count + 1) / count
        made = np.minimum(np.arange(count + 1) * self.method.interval, num_steps)
        row["step"] = self.num_steps + made[:-1]
        self.rows.append(row)
        self.num_rows += count
        self.num_steps += int(made[-1])

    def _locate(self, x: PyTree, theta: PyTree) -> None:
        """Where JAX is to find NaN: an error from the user's line, if one is made from x on."""
        problem, _ = self.given
        x, theta = restore(self.problem.inner, x, theta)
        locate(problem, self.method.inner_solver, x, theta)  # type: ignore[attr-defined]

    def progress(self) -> Progress:
        """What a callback is told."""
        place = copied(self.best.last)
        x, theta = restore(self.problem.inner, place.x, place.theta)
        last = self.rows[-1]
        return Progress(
            num_steps=self.num_steps,
            theta=theta,
            x=x,
            aux=place.aux,
            value=float(last["value"][-1]),
            hypergradient_norm=float(last["hypergradient_norm"][-1]),
            seconds=float(last["seconds"][-1]),
        )

    def solution(self, stopped_by: str) -> Solution:
        """Everything, as the user sees it."""
        columns = {name: joined(self.rows, name) for name in self.rows[0]}
        codes = columns["result"]
        columns["result"] = np.array(RESULTS.names())[codes]
        history = History(**columns)
        chosen, best, name = choose(self.best, history.value, history.result)
        if stopped_by == "failure":
            name = next(name for name in reversed(history.result) if name != "successful")
        if name == history.result[-1]:
            name = self._explained(name)
        x, theta = restore(self.problem.inner, chosen.place.x, chosen.place.theta)
        best_x, best_theta = restore(self.problem.inner, best.place.x, best.place.theta)
        stats = {
            "num_steps": self.num_steps,
            "last_value": float(history.value[-1]),
            "num_flagged": int(np.sum(history.result != "successful")),
            "stopped_by": stopped_by,
            "singular_since": self.singular_since,
            "num_outer_rows": num_rows(self.given[0].outer_data),
            "seconds": time.perf_counter() - self.start_time,
            "seconds_first_step": float(history.seconds[0]),
            **{name: int(np.sum(getattr(history, name))) for name in COUNTS},
        }
        return Solution(
            x=x,
            theta=theta,
            value=jnp.asarray(history.value[chosen.row]),
            aux=chosen.place.aux,
            result=getattr(RESULTS, name),
            best=BestEvaluation(
                theta=best_theta,
                x=best_x,
                value=jnp.asarray(history.value[best.row]),
                step=int(history.step[best.row]),
            ),
            history=history,
            stats=stats,
        )

    def _explained(self, name: str) -> str:
        """The outcome of the last evaluation, named more exactly if its inner solve failed."""
        result = getattr(RESULTS, name)
        if not is_unexplained(result):
            return name
        problem, x0 = self.given
        x, theta = restore(self.problem.inner, *self.best.last[1::-1])
        why = explained(problem, x0, theta, x, result).name
        # A linear solver that stalled says nothing about the inner solve.
        return name if why == "inner_not_converged" else why


def _report_failures(solution: Solution, throw: bool) -> None:
    """An error or a warning where the run was not successful."""
    failed = solution.result is not RESULTS.successful
    if failed and throw:
        raise SolveError(str(solution), solution.result)
    # Kinks are passed on the way, where the value is right; the report counts them.
    if failed or not np.isin(solution.history.result, ("successful", "at_kink")).all():
        warnings.warn(str(solution), RuntimeWarning, stacklevel=4)
