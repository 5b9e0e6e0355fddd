"""The oracles against the published digits, against finite differences, and against JAX.

Three independent ways to the same numbers: literals computed elsewhere; differences of
values whose x is solved anew at each theta, which know nothing of implicit
differentiation; and the derivatives of the JAX functions at the known solution.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util as jtu

import bilevax.testing as bt
from bilevax.testing._base import numbers

ORACLES = {oracle.name: oracle for oracle in bt.all_oracles(jnp.float64)}
# not in `all_oracles`: sizes and conditions of the judgements
ORACLES["quadratic, ill-conditioned"] = bt.quadratic(jnp.float64, 12, 7, condition=1e4)
ORACLES["ridge, scaled"] = bt.ridge(
    jnp.float64, 20, 10, feature_scale_decades=1.5, frequencies=bt.EVEN_FREQUENCIES
)
ORACLES["logistic, larger"] = bt.logistic(jnp.float64, 100, 20)

each_oracle = pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)

# Central differences in float64: truncation h^2/6 times a third derivative of order one,
# 2e-11, and rounding 1e-16/h, 1e-11, nearly balanced at h = 1e-5. x is solved anew to
# rounding error, so it adds no larger noise. 1e-8 leaves room for the conditioning.
STEP, FINITE_DIFFERENCE_RTOL = 1e-5, 1e-8


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(numbers(tree))])


def central_differences(fn, theta):
    """Column j is the derivative of `flat(fn(theta))` in entry j of theta."""
    leaves, treedef = jtu.tree_flatten(numbers(theta))
    columns = []
    for i, leaf in enumerate(leaves):
        for j in np.ndindex(leaf.shape):
            outs = []
            for step in (STEP, -STEP):
                moved = [x.copy() for x in leaves]
                moved[i][j] += step
                outs.append(flat(fn(jtu.tree_unflatten(treedef, moved))))
            columns.append((outs[0] - outs[1]) / (2 * STEP))
    return np.stack(columns, axis=-1)


def assert_digits(actual, text):
    """`actual` rounds to the printed digits: at most one unit of the last of them."""
    printed = text.split()
    wanted = np.array([float(number) for number in printed])
    units = np.array([10.0 ** -len(number.partition(".")[2]) for number in printed])
    actual = np.ravel(actual)
    assert actual.shape == wanted.shape
    assert np.all(np.abs(actual - wanted) <= units), (actual, wanted)


# --- the published digits ---------------------------------------------------------------


def test_scalar_game_digits():
    oracle = ORACLES["scalar_game"]
    assert_digits(oracle.value, "3.37375")
    assert_digits(oracle.hypergradient, "4.175")
    assert_digits(oracle.theta_star, "-0.8181818182")
    assert_digits(oracle.reference(oracle.theta_star).value, "0.2045454545")


def test_quadratic_game_digits():
    oracle = ORACLES["quadratic_game"]
    assert_digits(oracle.hypergradient, "-.2868 -.2824 -.7572")
    assert_digits(np.linalg.eigvalsh(oracle.hyper_hessian), ".473296888 .590090708 1.364612403")
    assert_digits(oracle.theta_star, ".323950461797 .443534844668 1.399013434089")
    optimum = oracle.reference(oracle.theta_star)
    assert_digits(optimum.x_star, "-1.317695214106 .331108312343")
    assert_digits(optimum.value, "-1.0811081024349")


@pytest.mark.parametrize("name", ["ridge", "least_squares"])
def test_ridge_digits(name):
    digits = "-0.017270337779 -0.011808927542 -0.002900638938 0.000131682401"
    assert_digits(ORACLES[name].hypergradient, digits)


def test_ridge_log_lambda_digits():
    oracle = ORACLES["ridge_log_lambda"]
    assert_digits(oracle.value, "1.3766857785668")
    assert_digits(oracle.hypergradient, "-0.0332006285210")
    assert_digits(oracle.theta_star, "0.2030269090")
    assert_digits(oracle.reference(oracle.theta_star).value, "1.3363560857")


def test_logistic_digits():
    oracle = ORACLES["logistic"]
    digits = ".20527463 .06769122 .34422225 .20974777 .19850648 .02265871"
    assert_digits(oracle.x_star, digits)
    assert_digits(oracle.value, "0.9945922738124")
    digits = "-.07060874 -.05333281 -.05003236 -.0382789 -.02975674 -.01951763"
    assert_digits(oracle.hypergradient, digits)


def test_data_weights_digits():
    oracle = ORACLES["data_weights"]
    assert_digits(oracle.value, "1.3632502975568")
    digits = "-.075174640529 .020011496263 .045338432687 .029229742856"
    assert_digits(oracle.hypergradient[:4], digits)
    assert_digits(np.linalg.norm(oracle.hypergradient), ".0987856744")


def test_fixed_point_digits():
    oracle = ORACLES["fixed_point"]
    assert_digits(oracle.x_star, "-.060501834542 -.265489272844 .178948434214 .441793021996")
    digits = "1.802571817988 -1.820353218183 -.324417009377 .234992737144"
    assert_digits(oracle.hypergradient, digits)
    # The forgotten transpose would give quite different numbers: the oracle can tell.
    wrong = [1.01275, -1.72140, -0.03371, 0.92349]
    assert bt.relative_error(oracle.hypergradient, np.array(wrong)) > 0.1


def test_overparameterised_digits():
    oracle = ORACLES["overparameterised"]
    digits = (
        ".535910055383 -.415156807357 -.543901831561 -.255400701081 -.162676574581 "
        "-.309063102238 -.340284562048"
    )
    assert_digits(oracle.x_star, digits)
    assert_digits(oracle.value, "1.9772089158930")
    assert_digits(oracle.hypergradient, "-.678949282029 -2.93224765661")
    assert_digits(oracle.theta_star, ".858306 .42216244")
    assert_digits(oracle.reference(oracle.theta_star).value, ".17639656086")


def test_learned_step_size():
    oracle = bt.learned_step_size(jnp.float64)
    assert_digits(oracle.value, ".0768825313289")
    assert_digits(oracle.hypergradient, "-.105931931957")

    # A plain loop over the JAX functions, and its derivative by JAX.
    def value(theta):
        x = oracle.x0
        for _ in range(oracle.num_steps):
            x = x - oracle.learning_rate * oracle.problem.inner.residual(x, theta)
        return oracle.problem.outer_value(x, theta)[0], x

    (loss, x), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(oracle.theta)
    assert bt.relative_error(x, oracle.x) <= 1e-14
    assert bt.relative_error(loss, oracle.value) <= 1e-14
    assert bt.relative_error(slope, oracle.hypergradient) <= 1e-13


# --- finite differences of values with x solved anew ------------------------------------


@each_oracle
def test_hypergradient_against_finite_differences(oracle):
    expected = central_differences(lambda theta: oracle.reference(theta).value, oracle.theta)
    error = bt.relative_error(flat(oracle.hypergradient), expected[0])
    assert error <= FINITE_DIFFERENCE_RTOL


@each_oracle
def test_jacobian_against_finite_differences(oracle):
    if oracle.jacobian is None:  # only where x or theta is a tree of several arrays
        assert oracle.name in {"nested", "root"}
        return
    expected = central_differences(lambda theta: oracle.reference(theta).x_star, oracle.theta)
    assert oracle.jacobian.shape == oracle.x0.shape + oracle.theta.shape
    error = bt.relative_error(oracle.jacobian.reshape(expected.shape), expected)
    assert error <= FINITE_DIFFERENCE_RTOL


WITH_HESSIAN = {n: o for n, o in ORACLES.items() if o.hyper_hessian is not None}
WITH_OPTIMUM = {n: o for n, o in ORACLES.items() if o.theta_star is not None}


@pytest.mark.parametrize("oracle", WITH_HESSIAN.values(), ids=WITH_HESSIAN)
def test_hyper_hessian_against_finite_differences(oracle):
    expected = central_differences(
        lambda theta: oracle.reference(theta).hypergradient, oracle.theta
    )
    error = bt.relative_error(oracle.hyper_hessian.reshape(expected.shape), expected)
    assert error <= FINITE_DIFFERENCE_RTOL


@pytest.mark.parametrize("oracle", WITH_OPTIMUM.values(), ids=WITH_OPTIMUM)
def test_optimum(oracle):
    hypergradient = oracle.reference(oracle.theta_star).hypergradient
    scale = np.linalg.norm(flat(oracle.hypergradient))
    assert np.linalg.norm(flat(hypergradient)) <= 1e-12 * max(scale, 1.0)
    curvature = central_differences(
        lambda theta: oracle.reference(theta).hypergradient, oracle.theta_star
    )
    assert np.all(np.linalg.eigvalsh((curvature + curvature.T) / 2) > 0)


def test_known_answers_are_present():
    games = {"scalar_game", "quadratic", "quadratic_game", "overparameterised"}
    assert games | {"scalar_root"} <= WITH_HESSIAN.keys()
    assert games | {"ridge_log_lambda", "nested"} <= WITH_OPTIMUM.keys()


# --- the JAX functions state the same problem -------------------------------------------


def arrays_of(tree):
    leaves, treedef = jtu.tree_flatten(tree)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

    def put_back(arrays):
        arrays = iter(arrays)
        return jtu.tree_unflatten(
            treedef, [next(arrays) if a else x for x, a in zip(leaves, is_array, strict=True)]
        )

    return [leaf for leaf, a in zip(leaves, is_array, strict=True) if a], put_back


def jax_side(oracle):
    """Residual, value and gradients at x*, and the two products with v*, flat."""
    x, put_x = arrays_of(oracle.x0)
    theta, put_theta = arrays_of(oracle.theta)
    # The answers, rounded to the dtype of the problem: trees of one structure as x0.
    dtype = x[0].dtype
    x = [jnp.asarray(leaf, dtype) for leaf in jtu.tree_leaves(numbers(oracle.x_star))]
    v = [jnp.asarray(leaf, dtype) for leaf in jtu.tree_leaves(numbers(oracle.v_star))]

    def outer(x, theta):
        return oracle.problem.outer_value(put_x(x), put_theta(theta))[0]

    # gradients with respect to lists of arrays, since strings cannot be differentiated
    inner = oracle.problem.inner
    if oracle.kind in {"minimum", "least_squares"}:
        objective = inner.objective if oracle.kind == "least_squares" else inner
        residual = jax.grad(lambda x, theta: objective(put_x(x), put_theta(theta)))
    else:

        def residual(x, theta):
            return jtu.tree_leaves(inner.residual(put_x(x), put_theta(theta)))

    @jax.jit
    def evaluate(x, theta, v):
        value, gradients = jax.value_and_grad(outer, argnums=(0, 1))(x, theta)
        zero, vjp = jax.vjp(residual, x, theta)
        return zero, value, gradients, vjp(v)

    return evaluate(x, theta, v)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("name", [oracle.name for oracle in bt.all_oracles(jnp.float32)])
def test_jax_functions_agree(name, dtype):
    oracle = getattr(bt, name)(dtype)
    # some hundred roundings, and an ill-conditioned sum here and there
    rtol = 1e-12 if dtype == jnp.float64 else 1e-4
    out = jax_side(oracle)
    assert all(leaf.dtype == dtype for leaf in jtu.tree_leaves(out))
    zero, value, (outer_x, outer_theta), (adjoint_x, adjoint_theta) = out
    scale = 1 + np.linalg.norm(flat(oracle.x_star))
    assert np.linalg.norm(flat(zero)) <= rtol * scale
    assert bt.relative_error(value, oracle.value) <= rtol
    if oracle.name == "overparameterised":  # inconsistent; solved in the range of A' only
        A = numbers(oracle.problem.inner_data)["A"]
        difference = flat(adjoint_x) - flat(outer_x)
        assert np.linalg.norm(A @ difference) <= rtol * np.linalg.norm(flat(outer_x))
        assert np.linalg.norm(difference) > 0.1  # what the plain system cannot meet
    else:
        assert bt.relative_error(flat(adjoint_x), flat(outer_x)) <= rtol
    total = flat(outer_theta) - flat(adjoint_theta)
    assert bt.relative_error(total, flat(oracle.hypergradient)) <= rtol
    if oracle.jacobian is not None:
        jacobian = oracle.jacobian.reshape(oracle.size, -1)
        total = flat(outer_theta) + jacobian.T @ flat(outer_x)
        assert bt.relative_error(total, flat(oracle.hypergradient)) <= rtol


# --- what makes the problems catch mistakes ---------------------------------------------


@each_oracle
def test_problems_catch_mistakes(oracle):
    """No answer is zero, and x0 is not the solution."""
    for answer in (oracle.x_star, oracle.v_star, oracle.hypergradient, oracle.value):
        assert np.linalg.norm(flat(answer)) > 1e-3
    assert bt.relative_error(oracle.x0, oracle.x_star) > 0.1


def test_flags():
    kinds = {oracle.kind for oracle in ORACLES.values()}
    assert kinds == {"minimum", "least_squares", "root", "fixed_point"}
    weak = {name for name, oracle in ORACLES.items() if not oracle.is_strongly_convex}
    assert weak == {"overparameterised", "scalar_root", "fixed_point", "root"}
    assert ORACLES["nested"].size == 5
    assert ORACLES["data_weights"].size == 4


def test_condition_number():
    hessian = numbers(bt.quadratic(jnp.float64, 12, 7, condition=1e4).problem.inner_data)["A"]
    assert np.linalg.cond(hessian) == pytest.approx(1e4, rel=1e-8)


def test_feature_scales():
    train, _ = numbers(bt.ridge(jnp.float64, 200, 100, 9, 1.5).problem.inner_data)
    plain, _ = numbers(bt.ridge(jnp.float64, 200, 100, 9).problem.inner_data)
    scale = train[0] / plain[0]
    assert scale[0] == pytest.approx(1.0)
    assert scale[-1] == pytest.approx(10**-1.5)


def test_answers_know_the_rounding_of_the_data():
    """float32 data are other data: the answers are those of the rounded problem."""
    rounded, exact = bt.ridge(jnp.float32), ORACLES["ridge"]
    error = bt.relative_error(rounded.x_star, exact.x_star)
    assert rounded.x_star.dtype == np.float64
    assert 1e-10 < error < 1e-5


def test_nested_keeps_what_is_not_an_array():
    oracle = ORACLES["nested"]
    assert oracle.theta["name"] == "theta"
    assert oracle.hypergradient["name"] is None
    wrong = {**oracle.x0, "name": "y"}
    with pytest.raises(ValueError, match="wanted 'x', got 'y'"):
        oracle.problem.inner(wrong, oracle.theta)


def test_dtype_must_be_available():
    # Where older JAX has it.
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(False), pytest.raises(ValueError, match="float64 is not enabled"):
        bt.scalar_game(jnp.float64)
    with enable_x64(False):
        assert bt.scalar_game().theta.dtype == jnp.float32
    with pytest.raises(ValueError, match="must be a floating-point dtype"):
        bt.scalar_game(jnp.int32)


# --- the helper that all other tests trust ----------------------------------------------


def test_relative_error_values():
    a = {"x": jnp.array([3.0, 4.0]), "none": None, "name": "a"}
    b = {"x": np.array([3.0, 3.0]), "none": None, "name": None}
    assert bt.relative_error(a, b) == pytest.approx(1 / np.sqrt(18))
    assert bt.relative_error(a, a) == 0.0
    # no tolerance hides in it, and it is relative to the second
    assert bt.relative_error(np.array(1.0 + 1e-12), np.array(1.0)) > 0.0
    assert bt.relative_error(np.array(1.0), np.array(2.0)) == 0.5
    assert bt.relative_error(np.array(3.0), np.array(0.0)) == 3.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_relative_error_of_nonfinite_is_infinite(bad):
    a, b = np.array([1.0, bad]), np.array([1.0, 2.0])
    assert bt.relative_error(a, b) == np.inf
    assert bt.relative_error(b, a) == np.inf
    assert bt.relative_error(a, a) == np.inf


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros(3), np.zeros((3, 1))),  # would broadcast
        (np.zeros(()), np.zeros(3)),
        ({"x": np.zeros(3)}, {"y": np.zeros(3)}),
        ({"x": np.zeros(3)}, {"x": None}),
        ((np.zeros(2), np.zeros(1)), (np.zeros(1), np.zeros(2))),
        (None, None),
    ],
)
def test_relative_error_refuses_what_does_not_compare(a, b):
    with pytest.raises(ValueError, match="relative_error"):
        bt.relative_error(a, b)
