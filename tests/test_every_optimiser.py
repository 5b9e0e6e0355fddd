"""Every Optax transformation, unrolled, against a plain Python loop under autodiff."""

import functools

import jax
import jax.numpy as jnp
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
    return jax.tree_util.tree_map(lambda a: a + 0.1 * jnp.sum(theta), X0)


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
    "signum": optax.signum(0.01),
    "sm3": optax.sm3(0.05),
    "rprop": optax.rprop(0.01),
    "optimistic": optax.optimistic_gradient_descent(0.05),
    "optimistic_adam": optax.optimistic_adam_v2(0.05),
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
    "ademamix": contrib.ademamix(0.05),
    "adopt": contrib.adopt(0.05),
    "madgrad": contrib.madgrad(0.05),
    "momo": contrib.momo(0.05),
    "schedule_free": contrib.schedule_free_sgd(0.05),
    "prodigy": contrib.prodigy(0.1),
    "dadapt": contrib.dadapt_adamw(0.1),
    "cocob": contrib.cocob(),
    "polyak": optax.polyak_sgd(max_learning_rate=0.1),
    "muon": contrib.muon(0.001),
}


LENGTHS = (100, 7, 2, 1)


@functools.lru_cache(maxsize=4)
def reference(name):
    """The derivative after each number of steps: a plain Python loop, forward and back.

    The chain rule is applied step by step, `jax.vjp` of one step at a time, because a
    traced loop of 100 steps takes minutes to compile.
    """
    optimiser = optax.with_extra_args_support(OPTIMISERS[name])

    def step(carry, theta):
        x, state = carry
        value, grad = jax.value_and_grad(inner)(x, theta)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes floats and integer counts
            updates, state = optimiser.update(
                grad, state, x, value=value, grad=grad, value_fn=lambda x: inner(x, theta)
            )
            return optax.apply_updates(x, updates), state

    @jax.jit
    def ahead_and_back(carry, theta, cotangent):  # one program: compilation is what costs
        new, transpose = jax.vjp(step, carry, theta)
        return new, transpose(cotangent)

    x0 = start(THETA)
    carries = [(x0, optimiser.init(x0))]
    no_cotangent = jax.tree_util.tree_map(zero_cotangent, carries[0])
    for _ in range(max(LENGTHS)):
        carries.append(ahead_and_back(carries[-1], THETA, no_cotangent)[0])
    grads = {}
    for length in LENGTHS:
        x, state = carries[length]
        x_bar, grad = jax.grad(outer, (0, 1))(x, THETA)
        cotangent = x_bar, jax.tree_util.tree_map(zero_cotangent, state)
        for carry in reversed(carries[:length]):
            _, (cotangent, theta_bar) = ahead_and_back(carry, THETA, cotangent)
            grad = grad + theta_bar
        # the start of the optimiser's state depends on x0, too
        _, from_start = jax.vjp(lambda t: (start(t), optimiser.init(start(t))), THETA)
        grads[length] = grad + from_start(cotangent)[0]
    return grads


def zero_cotangent(a):
    a = jnp.asarray(a)
    is_float = jnp.issubdtype(a.dtype, jnp.floating)
    return jnp.zeros_like(a) if is_float else np.zeros(a.shape, jax.dtypes.float0)


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


# One reference serves both parts of a test: they stand next to each other.
PARTS = ("default policy", pytest.param("every policy", marks=pytest.mark.slow))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_unrolled_equals_a_python_loop(name, part):
    expected = reference(name)
    lengths = (100, 7, 2, 1) if name in ("adam", "momentum", "clip") else (100,)
    cases = dict.fromkeys(lengths, "sqrt")
    if part == "every policy":
        cases = {100: 3, 7: "all", 2: "sqrt", 1: 1}
    for length, checkpoints in cases.items():
        grad = unrolled(OPTIMISERS[name], length, checkpoints).grad
        assert relative_error(grad, expected[length]) < 1e-12, length
    if part == "every policy":
        # Compiled programs are mapped into memory, and a process may have 65,530 mappings.
        jax.clear_caches()


@pytest.mark.parametrize("name", ["momentum", "adamw", "cosine"])
def test_every_memory_policy_equals_a_python_loop(name):
    for checkpoints in ("all", 3, bx.MemoryBudget(4_000)):
        grad = unrolled(OPTIMISERS[name], 100, checkpoints).grad
        assert relative_error(grad, reference(name)[100]) < 1e-12


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
            jax.tree_util.tree_map(jnp.zeros_like, X0) if "lbfgs" in name else X0,
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
    grad = unrolled(optax.lbfgs(), 100).grad
    assert relative_error(grad, exact.grad) < 1e-8
