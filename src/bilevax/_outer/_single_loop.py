"""The single loop: x, v and theta move together, a step each."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Int, PyTree

from .._checks import check_count
from .._hypergradient._base import AbstractHypergradient, HypergradientState, Query
from .._hypergradient._point import directions
from .._hypergradient.implicit._implicit import Implicit
from .._inner._default import as_inner_solver
from .._jit import optimizer_as_pytree, standard_promotion
from .._problem import Bilevel, start_at
from .._tree import strong, tree_all_finite, tree_zeros_like
from ._base import AbstractMethod
from ._evaluation import Evaluation
from ._fall_back import is_right


class SingleLoop(AbstractMethod):
    """One step each of x, of the adjoint variable v and of theta; repeat. SOBA, on all data.

        x     <- x     - rho   grad_x U(x, theta)
        v     <- v     - sigma (A v - d_x L)
        theta <- theta - gamma (d_theta L - B^T v)

    all three from the same point, `A` and `B` the second derivatives of `U` there. Nothing
    is solved, so that an outer step costs as little as it can; x and v follow theta, if that
    is slow enough. For inner problems that are minima or fixed points.

    **Arguments:**

    - `optimizer`: the Optax transformation that moves theta.
    - `inner_optimizer`: the one that moves x, say `optax.sgd(1 / L)`, `L` the largest
        curvature of U: `bx.check` prints it.
    - `adjoint_optimizer`: the one that moves v; by default a copy of `inner_optimizer`.
    - `evaluate_every`: steps from one evaluation to the next.
    - `inner_solver`, `hypergradient`: of the evaluations, as in `bx.hypergradient`.

    **What is reported** comes from evaluations: the inner problem solved and the hypergradient
    taken at theta, from x and v on, to their own tolerances. They cost more than steps, and
    leave x, v and theta as they were. So the history has values of `F(theta)` and true norms,
    flags are those of other methods, and `solution.x` solves the inner problem. Where theta
    has run away, the outcome is `nonfinite`, and what is returned is the best of the run:
    divide the steps, `gamma` first.

    **Cost:** of a step, two gradients, one Hessian and one cross product.

    **Exact when** it converges, which it does linearly for strongly convex problems and
    steps that are small enough: at a fixed point all three directions are zero.

    !!! example

        ```python
        import bilevax as bx, jax.numpy as jnp, optax

        problem = bx.Bilevel(
            inner=lambda x, theta: jnp.sum((x - 1.0) ** 2 + jnp.exp(theta) * x**2),
            outer=lambda x, theta: jnp.sum((x - 0.5) ** 2),
        )
        method = bx.SingleLoop(optax.sgd(0.5), inner_optimizer=optax.sgd(0.1))
        bx.solve(problem, jnp.zeros(3), -jnp.ones(3), method, num_steps=200)
        ```

    Reference: Dagreou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that
    enables stochastic and global variance reduction algorithms", 2022, algorithm 1.
    """

    optimizer: Any
    inner_optimizer: Any
    adjoint_optimizer: Any
    evaluate_every: int = eqx.field(static=True)
    inner_solver: Any
    hypergradient: AbstractHypergradient

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        *,
        inner_optimizer: optax.GradientTransformation,
        adjoint_optimizer: optax.GradientTransformation | None = None,
        evaluate_every: int = 10,
        inner_solver: Any = None,
        hypergradient: AbstractHypergradient | None = None,
    ) -> None:
        adjoint_optimizer = inner_optimizer if adjoint_optimizer is None else adjoint_optimizer
        given = {
            "optimizer": optimizer,
            "inner_optimizer": inner_optimizer,
            "adjoint_optimizer": adjoint_optimizer,
        }
        for name, value in given.items():
            if not isinstance(value, optax.GradientTransformation):
                raise TypeError(
                    f"SingleLoop({name}=...) must be an Optax transformation such as "
                    f"optax.sgd(0.1); got {type(value).__name__}."
                )
        if not (hypergradient is None or isinstance(hypergradient, AbstractHypergradient)):
            raise TypeError(
                "SingleLoop(hypergradient=...) must be a rule such as bx.Implicit(); got "
                f"{type(hypergradient).__name__}."
            )
        check_count("SingleLoop", required=True, evaluate_every=evaluate_every)
        self.optimizer = optimizer_as_pytree(optimizer)
        self.inner_optimizer = optimizer_as_pytree(inner_optimizer)
        self.adjoint_optimizer = optimizer_as_pytree(adjoint_optimizer)
        self.evaluate_every = evaluate_every
        self.inner_solver = inner_solver
        self.hypergradient = Implicit() if hypergradient is None else hypergradient

    @property
    def interval(self) -> int:
        return self.evaluate_every

    def init(self, problem: Bilevel, x0: PyTree, theta: PyTree) -> "SingleLoopState":
        if problem.inner.objective is None and problem.inner.iteration is None:
            raise TypeError(
                "SingleLoop moves x down the gradient of a minimum or along a fixed-point "
                f"iteration; {type(problem.inner).__name__} has neither. Use bx.DoubleLoop()."
            )
        x = start_at(x0, theta)
        v = tree_zeros_like(x)
        solver = as_inner_solver(self.inner_solver, problem.inner, x)
        with standard_promotion():
            return SingleLoopState(
                x=x,
                v=v,
                theta=theta,
                inner=strong(self.inner_optimizer.init(x)),
                adjoint=strong(self.adjoint_optimizer.init(v)),
                outer=strong(self.optimizer.init(theta)),
                num_steps=jnp.zeros((), jnp.int32),
                warm=self.hypergradient.init(Query(problem, solver, x, theta)),
            )

    def step(
        self, problem: Bilevel, state: "SingleLoopState", seen: Evaluation
    ) -> "SingleLoopState":
        del seen
        down = directions(problem, state.x, state.v, state.theta)
        x, inner = _moved(self.inner_optimizer, down.x, state.inner, state.x)
        v, adjoint = _moved(self.adjoint_optimizer, down.v, state.adjoint, state.v)
        theta, outer = _moved(self.optimizer, down.theta, state.outer, state.theta)
        return SingleLoopState(x, v, theta, inner, adjoint, outer, state.num_steps + 1, state.warm)

    def evaluate(
        self, problem: Bilevel, x0: PyTree, state: "SingleLoopState", is_last: Bool[Array, ""]
    ) -> tuple[Evaluation, "SingleLoopState"]:
        del x0, is_last
        solver = as_inner_solver(self.inner_solver, problem.inner, state.x)
        warm = eqx.tree_at(lambda s: s.x, state.warm, state.x)
        if warm.v is not None:
            warm = eqx.tree_at(lambda s: s.v, warm, state.v)
        query = Query(problem, solver, state.x, state.theta)
        estimate, warm = self.hypergradient.estimate(query, warm)
        is_finite = tree_all_finite((state.x, state.v, state.theta))
        evaluation = Evaluation.of(
            estimate,
            state.theta,
            usable=is_right(estimate) & is_finite,
            stats=_with_steps(estimate.stats, state.num_steps),
            is_random=jnp.array(warm.rule is not None or not solver.is_repeatable),
            gave_up=~is_finite,
        )
        kept = jtu.tree_map(
            lambda new, old: jnp.where(tree_all_finite(new), new, old), warm, state.warm
        )
        return evaluation, eqx.tree_at(
            lambda s: (s.warm, s.num_steps), state, (kept, jnp.zeros((), jnp.int32))
        )


class SingleLoopState(eqx.Module):
    """What the next step needs."""

    x: PyTree[Array]
    v: PyTree[Array]
    theta: PyTree[Array]
    inner: PyTree  # the state of each optimiser
    adjoint: PyTree
    outer: PyTree
    num_steps: Int[Array, ""]  # since the last evaluation
    warm: HypergradientState  # of the evaluations


def _moved(
    optimizer: Any, direction: PyTree, state: PyTree, at: PyTree
) -> tuple[PyTree[Array], PyTree]:
    """One step of an Optax transformation down `direction`."""
    with standard_promotion():
        updates, state = optimizer.update(direction, state, at)
        return optax.apply_updates(at, updates), strong(state)


def _with_steps(stats: dict[str, Array], num_steps: Int[Array, ""]) -> dict[str, Array]:
    """The oracle calls of an evaluation and of the steps before it."""
    calls = {
        "num_gradients": 2,
        "num_hessian_products": 1,
        "num_cross_products": 1,
        "num_inner_steps": 1,
        "num_adjoint_steps": 1,
    }
    return {name: count + calls[name] * num_steps for name, count in stats.items()}
