"""One-step differentiation: only one more step of the inner algorithm."""

from jaxtyping import Scalar

from ._k_step import KStep


class OneStep(KStep):
    """The derivative of one more step of the inner algorithm, at its result.

    `x` is solved for and taken as a constant, and

        grad of L(T(x, theta), theta),    T one step of the inner algorithm.

    `KStep` with K = 1: see there for what a step is.

    **Arguments:**

    - `step_size`: as in `KStep`.

    What is differentiated: theta where it enters that step, not `x0`.

    **Cost:** one step forward and back: no Hessian product, one cross product; twice that
    for the error estimate, and ten Hessian products where a step size is measured.

    **Exact when** T contracts at once (Newton's method: but then `Implicit` is the same
    thing). In general the relative error is about `rho`, the contraction factor of T: a
    gradient step with condition number 100 has `rho = 0.99`, and the result is then a
    direction rather than a gradient. `adjoint_residual` and `error_estimate` say so, and in
    `bx.argmin` and Optimistix, which have no estimate, a `UserWarning` where more than a
    tenth of the adjoint system is left; it is flagged only where T does not contract.

    !!! example

        ```python
        import bilevax as bx

        rule = bx.OneStep()
        ```

    Reference: Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms",
    2023, eq. (3) and corollary 1.
    """

    def __init__(self, step_size: float | Scalar | None = None) -> None:
        super().__init__(1, step_size)
