"""How long does a hypergradient through a lasso or a batch of quadratic programs take?"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from _common import arguments, print_header, print_table, race

KEPT = 20


def main() -> None:
    args = arguments(__doc__ or "")
    import jax

    jax.config.update("jax_enable_x64", True)
    print_header(__doc__ or "")
    num_rounds = args.rounds or (2 if args.quick else 15)
    shape = (60, 80) if args.quick else (2_000, 5_000)
    print(
        f"A lasso of {shape[0]} x {shape[1]} with {KEPT} coefficients kept, float64: solution and"
    )
    print("hypergradient of the validation loss in the logarithm of the strength.\n")
    show(lasso(*shape), num_rounds)
    num, size, num_rows = (3, 5, 4) if args.quick else (64, 50, 30)
    print(f"{num} quadratic programs of {size} variables and {num_rows} inequalities under vmap:")
    print("solutions and gradients in their linear terms.\n")
    show(programs(num, size, num_rows), num_rounds)


def show(cases: dict[str, Callable[[], Any]], num_rounds: int) -> None:
    """A row a case; errors are to the most exact of them, the first."""
    exact = np.asarray(next(iter(cases.values()))())
    timings = race(cases, num_rounds)
    first = timings[next(iter(cases))]
    rows = []
    for name, case in cases.items():
        error = np.linalg.norm(np.asarray(case()) - exact) / np.linalg.norm(exact)
        wall, cpu = (1e3 * statistics.median(t) for t in timings[name])
        rows.append(
            (name, f"{wall:.1f}", f"{cpu:.1f}", f"{timings[name].ratio(first):.2f}", f"{error:.0e}")
        )
    print_table(("", "ms", "CPU ms", "ratio", "error"), rows)


def lasso(num: int, size: int) -> dict[str, Callable[[], Any]]:
    """Ours, JAXopt's, and celer with a restricted solve written by hand."""
    import jax
    import jax.numpy as jnp

    import bilevax as bx

    rng = np.random.default_rng(0)
    X = rng.normal(size=(num + num // 4, size))
    truth = np.zeros(size)
    truth[rng.choice(size, KEPT, replace=False)] = rng.choice([-1, 1], KEPT) * rng.uniform(
        1, 2, KEPT
    )
    y = X @ truth + 0.5 * rng.normal(size=len(X))
    train, validation = (X[:num], y[:num]), (X[num:], y[num:])
    strength = 0.2 * np.max(np.abs(train[0].T @ train[1])) / num
    data = jax.device_put((train, validation))
    theta, x0 = jnp.log(strength), jnp.zeros(size)

    def loss(x: Any, theta: Any, data: Any) -> Any:
        return 0.5 * jnp.mean((data[0] @ x - data[1]) ** 2)

    @jax.jit
    def ours(data: Any, theta: Any) -> Any:
        train, validation = data
        inner = bx.ProximalMinimum(loss, bx.prox.L1(jnp.exp), train)
        problem = bx.Bilevel(inner, loss, outer_data=validation)
        found, _ = bx.hypergradient(problem, x0, theta, throw=False)
        return found.grad

    cases = {"bilevax": lambda: ours(data, theta)}
    try:
        import celer
    except ImportError:
        print("celer is not installed: its row is left out.\n")
    else:
        model = celer.Lasso(alpha=strength, tol=1e-9, fit_intercept=False)
        columns = (np.asfortranarray(train[0]), train[1])
        cases["celer, and by hand"] = partial(by_hand, model, columns, validation, strength)
    try:
        import jaxopt
    except ImportError:
        print("JAXopt is not installed: its row is left out.\n")
    else:
        solver = jaxopt.ProximalGradient(
            lambda x, data: loss(x, None, data),
            prox=lambda x, strength, scale=1.0: jaxopt.prox.prox_lasso(x, strength, scale),
            tol=1e-7,
            maxiter=10_000,
        )

        @jax.jit
        @jax.grad
        def theirs(theta: Any, data: Any) -> Any:
            x = solver.run(x0, jnp.exp(theta), data[0]).params
            return loss(x, None, data[1])

        cases["JAXopt ProximalGradient"] = lambda: theirs(theta, data)
    return cases


def by_hand(model: Any, train: Any, validation: Any, strength: float) -> Any:
    """The hypergradient on the support that a lasso has found."""
    (X, y), (Xv, yv) = train, validation
    x = model.fit(X, y).coef_
    kept = np.flatnonzero(x)
    XS, XvS = X[:, kept], Xv[:, kept]
    grad = XvS.T @ (XvS @ x[kept] - yv) / len(yv)
    v = np.linalg.solve(XS.T @ XS / len(y), grad)
    return np.asarray(-strength * np.sign(x[kept]) @ v)


def programs(num: int, size: int, num_rows: int) -> dict[str, Callable[[], Any]]:
    """Ours and qpax."""
    import jax
    import jax.numpy as jnp

    import bilevax as bx

    rng = np.random.default_rng(0)
    roots = rng.normal(size=(num, size, size))
    Q = jnp.asarray(roots @ roots.transpose(0, 2, 1) / size + 0.1 * np.eye(size))
    q, G = jnp.asarray(rng.normal(size=(num, size))), rng.normal(size=(num, num_rows, size))
    rest = (Q, jnp.asarray(G), jnp.asarray(rng.uniform(size=(num, num_rows))))
    seen = jnp.asarray(rng.normal(size=size))
    solution = bx.argmin(
        bx.QP(Q=lambda t: t["Q"], q=lambda t: t["q"], G=lambda t: t["G"], h=lambda t: t["h"])
    )

    def of(solve: Callable) -> Callable:
        def total(q: Any, Q: Any, G: Any, h: Any) -> Any:
            return jnp.sum(jax.vmap(lambda *at: (seen @ solve(*at)) ** 2)(Q, q, G, h))

        return jax.jit(jax.grad(total))

    ours = of(lambda Q, q, G, h: solution(jnp.zeros(size), {"Q": Q, "q": q, "G": G, "h": h}))
    cases = {"bilevax": lambda: ours(q, *rest)}
    try:
        import qpax
    except ImportError:
        print("qpax is not installed: its rows are left out.\n")
        return cases
    none = (jnp.zeros((0, size)), jnp.zeros(0))
    for name, settings in {
        "qpax": {},
        "qpax, to 1e-8": {"solver_tol": 1e-8, "target_kappa": 1e-8},
    }.items():
        layer = partial(qpax.solve_qp_primal, **settings)
        theirs = of(lambda Q, q, G, h, layer=layer: layer(Q, q, *none, G, h))
        cases[name] = partial(theirs, q, *rest)
    return cases


if __name__ == "__main__":
    main()
