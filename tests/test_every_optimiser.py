"""Every Optax transformation in a step, and loops of steps, against plain autodiff."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.testing import relative_error

THETA = jnp.asarray([0.3, -0.2])
X0 = {"a": jnp.asarray([[0.5, -1.0], [0.25, 1.5]]), "b": jnp.asarray([0.7])}
MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))


def flat(x):
    return jnp.concatenate([x["a"].reshape(-1), x["b"]])


def inner(x, theta):
    """Smooth, not quadratic, not separable; no entry of its gradient is ever zero."""
    r = MATRIX @ flat(x) - jnp.linspace(-1.0, 1.0, 6) * theta[0]
    return jnp.sum(jnp.log(jnp.cosh(r))) + 0.5 * jnp.exp(theta[1]) * jnp.sum(flat(x) ** 2)


def outer(x, theta):
    return jnp.sum(jnp.sin(flat(x)) * jnp.arange(1.0, 6.0)) + theta[0] * theta[1]


def start(theta):
    return jtu.tree_map(lambda a: a + 0.1 * jnp.sum(theta), X0)


def newer(module, name, *args):
    """An optimiser that the oldest Optax supported does not have; `None` there."""
    return getattr(module, name)(*args) if hasattr(module, name) else None


contrib = optax.contrib
schedule = optax.exponential_decay(0.1, 3, 0.8)
# Not here, as they are random or need more than a gradient: noisy_sgd, add_noise, sam,
# lookahead (parameters in pairs), zero_nans' and apply_if_finite's bookkeeping.
OPTIMISERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, momentum=0.8),
    "nesterov": optax.sgd(0.05, momentum=0.8, nesterov=True),
    "adam": optax.adam(0.05),
    "adam_nesterov": optax.adam(0.05, nesterov=True),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "adamax": optax.adamax(0.05),
    "adamaxw": optax.adamaxw(0.05),
    "nadam": optax.nadam(0.05),
    "nadamw": optax.nadamw(0.05),
    "amsgrad": optax.amsgrad(0.05),
    "adabelief": optax.adabelief(0.05),
    "adan": optax.adan(0.05),
    "yogi": optax.yogi(0.05),
    "novograd": optax.novograd(0.001),
    "lamb": optax.lamb(0.05),
    "lars": optax.lars(0.05, momentum=0.5),
    "fromage": optax.fromage(0.05),
    "rmsprop": optax.rmsprop(0.001),
    "rmsprop_centered": optax.rmsprop(0.001, centered=True, momentum=0.5),
    "adagrad": optax.adagrad(0.1),
    "adadelta": optax.adadelta(0.5),
    "adafactor": optax.adafactor(0.05, min_dim_size_to_factor=2),
    "lion": optax.lion(0.01),
    "sign_sgd": optax.sign_sgd(0.01),
    "signum": newer(optax, "signum", 0.01),
    "sm3": optax.sm3(0.05),
    "rprop": optax.rprop(0.01),
    "optimistic": optax.optimistic_gradient_descent(0.05),
    "optimistic_adam": newer(optax, "optimistic_adam_v2", 0.05),
    "exponential": optax.sgd(schedule),
    "cosine": optax.adam(optax.cosine_decay_schedule(0.1, 50)),
    "warmup": optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 50)),
    "piecewise": optax.sgd(optax.piecewise_constant_schedule(0.1, {3: 0.5})),
    "clip": optax.chain(optax.clip(0.4), optax.sgd(0.1)),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(0.3), optax.sgd(0.1)),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "weight_decay": optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1)),
    "ema": optax.chain(optax.ema(0.9), optax.scale(-0.1)),
    "normalized": optax.chain(optax.normalize_by_update_norm(), optax.scale(-0.02)),
    "multi_steps": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "inject": optax.inject_hyperparams(optax.sgd)(learning_rate=schedule, momentum=0.5),
    "acprop": contrib.acprop(0.001),
    "ademamix": newer(contrib, "ademamix", 0.05),
    "adopt": newer(contrib, "adopt", 0.05),
    "madgrad": newer(contrib, "madgrad", 0.05),
    "momo": contrib.momo(0.05),
    "schedule_free": contrib.schedule_free_sgd(0.05),
    "prodigy": contrib.prodigy(0.1),
    "dadapt": contrib.dadapt_adamw(0.1),
    "cocob": contrib.cocob(),
    "polyak": optax.polyak_sgd(max_learning_rate=0.1),
    "muon": newer(contrib, "muon", 0.001),
}
OPTIMISERS = {name: optimiser for name, optimiser in OPTIMISERS.items() if optimiser is not None}


def plain_step(optimiser, carry, theta):
    """One step as its author would write it."""
    x, state = carry
    value, grad = jax.value_and_grad(inner)(x, theta)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes floats and integer counts
        updates, state = optax.with_extra_args_support(optimiser).update(
            grad, state, x, value=value, grad=grad, value_fn=lambda x: inner(x, theta)
        )
        return optax.apply_updates(x, updates), state


def zero_cotangent(a):
    a = jnp.asarray(a)
    is_float = jnp.issubdtype(a.dtype, jnp.floating)
    return jnp.zeros_like(a) if is_float else np.zeros(a.shape, jax.dtypes.float0)


def cotangents(carry, seed):
    """Random ones, of the sizes of the carry's own entries."""
    rng = np.random.default_rng(seed)

    def one(a):
        zero = zero_cotangent(a)
        is_float = zero.dtype != jax.dtypes.float0
        return jnp.asarray(rng.normal(size=zero.shape), zero.dtype) if is_float else zero

    return jtu.tree_map(one, carry)


# A loop applies the chain rule to steps, whatever is in them (see below and
# `test_memory_policies.py`): what differs from optimiser to optimiser is the step.
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_derivative_of_a_step_is_that_of_its_optimiser(name):
    solver = bx.Descent(OPTIMISERS[name], num_steps=1)
    condition = bx.Minimum(inner)

    @jax.jit  # one program: compilation is what costs
    def both(carry, theta, cotangent):
        plain, back = jax.vjp(lambda *args: plain_step(OPTIMISERS[name], *args), carry, theta)
        ours, our_back = jax.vjp(lambda c, t: solver.step(condition, t, c), carry, theta)
        return plain, ours, back(cotangent), our_back(cotangent)

    x0 = start(THETA)
    carry = solver.start(condition, x0, THETA, solver.init(condition, x0, THETA))
    # Not where it started: there `cocob` takes the larger of two equal numbers.
    carry = (jtu.tree_map(lambda a: 1.01 * a, carry[0]), *carry[1:])
    for k in range(6):
        with jax.numpy_dtype_promotion("standard"):
            plain, ours, *derivatives = both(carry, THETA, cotangents(carry, k))
        for expected, found in zip(jtu.tree_leaves(plain), jtu.tree_leaves(ours), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
        expected, found = (_floats(d) for d in derivatives)
        # A moment that is zero, of which a step takes the root: there autodiff has infinity.
        is_known = np.isfinite(expected)
        assert k == 0 or is_known.all()
        expected, found = expected[is_known], found[is_known]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * abs(expected).max())
        carry = ours


def _floats(derivative):
    leaves = [a for a in jtu.tree_leaves(derivative) if a.dtype != jax.dtypes.float0]
    return np.concatenate([np.asarray(a, float).reshape(-1) for a in leaves])


def reference(name, length):
    """The derivative after `length` steps: a plain Python loop, forward and back.

    The chain rule is applied step by step, `jax.vjp` of one step at a time, because a
    traced loop of 100 steps takes minutes to compile.
    """
    optimiser = optax.with_extra_args_support(OPTIMISERS[name])

    @jax.jit
    def ahead_and_back(carry, theta, cotangent):
        new, transpose = jax.vjp(lambda *args: plain_step(optimiser, *args), carry, theta)
        return new, transpose(cotangent)

    x0 = start(THETA)
    carries = [(x0, optimiser.init(x0))]
    no_cotangent = jtu.tree_map(zero_cotangent, carries[0])
    for _ in range(length):
        carries.append(ahead_and_back(carries[-1], THETA, no_cotangent)[0])
    x, state = carries[length]
    x_bar, grad = jax.grad(outer, (0, 1))(x, THETA)
    cotangent = x_bar, jtu.tree_map(zero_cotangent, state)
    for carry in reversed(carries[:length]):
        _, (cotangent, theta_bar) = ahead_and_back(carry, THETA, cotangent)
        grad = grad + theta_bar
    # the start of the optimiser's state depends on x0, too
    _, from_start = jax.vjp(lambda t: (start(t), optimiser.init(start(t))), THETA)
    return grad + from_start(cotangent)[0]


def unrolled(optimiser, num_steps, checkpoints="sqrt"):
    estimate, _ = bx.hypergradient(
        bx.Bilevel(inner, outer),
        start,
        THETA,
        inner_solver=bx.Descent(optimiser, num_steps=num_steps),
        rule=bx.Unrolled(checkpoints=checkpoints),
        throw=False,
    )
    return estimate


# Moments; a state that is also a point; integers and branches in the state; a loop inside the
# step; an optimiser that asks for values.
@pytest.mark.parametrize("name", ["adam", "schedule_free", "multi_steps", "muon", "polyak"])
def test_unrolled_equals_a_python_loop(name):
    if name not in OPTIMISERS:
        pytest.skip("this Optax does not have it")
    assert relative_error(unrolled(OPTIMISERS[name], 100).grad, reference(name, 100)) < 1e-12


@pytest.mark.parametrize(("num_steps", "checkpoints"), [(7, "all"), (2, "sqrt"), (1, 1)])
def test_a_short_loop_equals_a_python_loop(num_steps, checkpoints):
    grad = unrolled(OPTIMISERS["momentum"], num_steps, checkpoints).grad
    assert relative_error(grad, reference("momentum", num_steps)) < 1e-12


def test_every_memory_policy_equals_a_python_loop():
    """Beside "sqrt", which is above. Moments and a count, on which the step size depends."""
    expected = reference("cosine", 100)
    for checkpoints in ("all", 3, bx.MemoryBudget(4_000)):
        grad = unrolled(OPTIMISERS["cosine"], 100, checkpoints).grad
        assert relative_error(grad, expected) < 1e-12


# Plain autodiff gives NaN for these: they divide by zero, or take its root, in a branch
# that `where` discards. So central differences; 1e-5 is the cube root of their rounding.
GUARDED = {
    "radam": optax.radam(0.05),
    "dog": contrib.dog(),
    "lbfgs from zero": optax.lbfgs(0.5, linesearch=None),
    "adam, an entry without gradient": optax.adam(0.05, eps=1e-3),
}


@pytest.mark.parametrize("name", GUARDED)
def test_where_autodiff_says_nan_the_derivative_is_right(name):
    def from_zero(x, theta):
        return inner(x, theta) if "lbfgs" in name else inner({**x, "b": 0 * x["b"]}, theta)

    def estimate(theta):
        return bx.hypergradient(
            bx.Bilevel(from_zero, outer),
            jtu.tree_map(jnp.zeros_like, X0) if "lbfgs" in name else X0,
            theta,
            inner_solver=bx.Descent(GUARDED[name], num_steps=7),
            rule=bx.Unrolled(),
            throw=False,
        )[0]

    ours = estimate(THETA)
    assert ours.result == bx.RESULTS.successful
    for i, e in enumerate(1e-5 * np.eye(2)):
        difference = (estimate(THETA + e).value - estimate(THETA - e).value) / 2e-5
        np.testing.assert_allclose(ours.grad[i], difference, rtol=1e-6, atol=1e-8)


def test_lbfgs_is_right_long_after_convergence():
    exact, _ = bx.hypergradient(
        bx.Bilevel(inner, outer), X0, THETA, inner_solver=bx.NewtonCG(rtol=1e-13)
    )
    grad = unrolled(optax.lbfgs(), 100, "all").grad  # which compiles quickest
    assert relative_error(grad, exact.grad) < 1e-8
