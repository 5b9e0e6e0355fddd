"""Inside `jax.shard_map`, in a process of its own: the number of devices is set at its start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np, optax, optimistix as optx
jax.config.update("jax_enable_x64", True)
from jax.sharding import PartitionSpec as P
import bilevax as bx

mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
TARGETS = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)
THETA = jnp.array([0.3, -0.2, 0.1])
THETAS, X0 = jnp.tile(THETA, (4, 1)), jnp.zeros(3)
S = 1 / (1 + jnp.exp(THETA))  # x* = S * target
EACH = -2 * TARGETS**2 * S**2 * (1 - S)
MEAN = jnp.mean(TARGETS, axis=0)
SHARED = -2 * MEAN**2 * S**2 * (1 - S)
HESSIANS = jax.vmap(
    lambda t: jax.hessian(lambda th: jnp.sum((t / (1 + jnp.exp(th))) ** 2))(THETA)
)(TARGETS)

def inner(x, theta, t):
    return 0.5 * jnp.sum((x - t) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)

def together(x, theta, t):
    return jax.lax.pmean(0.5 * jnp.sum((x - t) ** 2), "i") + 0.5 * jnp.sum(jnp.exp(theta) * x**2)

def outer(x, theta):
    return jnp.sum(x**2)

def sharded(fn, *args, specs=(P("i"), P("i")), out=P("i"), **options):
    mapped = jax.shard_map(fn, in_specs=specs, out_specs=out, **{"mesh": mesh, **options})
    return jax.jit(mapped)(*args)

def through_argmin(condition, theta, solver=None, rule=None, throw=True):
    x_star = bx.argmin(condition, solver, rule, throw=throw)
    return jax.grad(lambda theta: outer(x_star(X0, theta), theta))(theta)

def estimate(fn, t, theta, outer=outer, **options):
    return bx.hypergradient(bx.Bilevel(fn, outer, inner_data=t), X0, theta, **options)[0]

def close(got, want, rtol=1e-6):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-9)

def refused(fn, *args, saying="communicates", **options):
    try:
        sharded(fn, *args, **options)
    except TypeError as error:
        assert saying in str(error) and "bx.argmin" in str(error), error
    else:
        raise AssertionError("not refused")
"""
DESCENT = 'bx.Descent(optax.sgd(0.4), num_steps=80), bx.Unrolled(checkpoints="all")'
CHECKS = {
    "every device a problem": """
for options in (
    (), (bx.LBFGS(rtol=1e-9), bx.Implicit(bx.linear.CG(rtol=1e-10))), (DESCENT),
    (optx.BFGS(1e-8, 1e-8), bx.Implicit(bx.linear.MINRES(rtol=1e-9))),
):
    close(sharded(lambda t, th: through_argmin(bx.Minimum(inner, t[0]), th[0], *options)[None],
                  TARGETS, THETAS), EACH)
root = bx.Root(lambda x, th, t: x - t + jnp.exp(th) * x, TARGETS[0])
close(sharded(lambda t, th: through_argmin(bx.Root(root.fn, t[0]), th[0])[None], TARGETS, THETAS),
      EACH)
""",
    "hypergradients, their derivative, and a shared theta": """
close(sharded(lambda t, th: estimate(inner, t[0], th[0]).grad[None], TARGETS, THETAS), EACH)
close(sharded(lambda t, th: jax.jacrev(lambda th: estimate(inner, t[0], th).grad)(th[0])[None],
              TARGETS, THETAS), HESSIANS)
shared = dict(specs=(P("i"), P()), out=P())
close(sharded(lambda t, th: through_argmin(bx.Minimum(inner, t[0]), th), TARGETS, THETA, **shared),
      EACH.sum(0))
def recursive(t):
    def fn(x, th, depth=1):
        return fn(x, th, depth - 1) if depth else inner(x, th, t)
    return fn
class Model:
    def __init__(self, t):
        self.loss = jax.jit(lambda x, th: inner(x, th, t))
    def __call__(self, x, th):
        return self.loss(x, th)
of_closure = lambda make, t: jax.grad(
    lambda t: jnp.sum(bx.argmin(make(t))(X0, THETA) ** 2))(t)
for make in (recursive, Model, lambda t: functools.partial(inner, t=t)):
    close(sharded(lambda t, _: of_closure(make, t[0])[None], TARGETS, THETAS),
          2 * TARGETS * S**2)
summed = lambda t, th: jax.grad(lambda th: jax.lax.psum(
    outer(bx.argmin(bx.Minimum(inner, t[0]))(X0, th), th), "i"))(th)
close(sharded(summed, TARGETS, THETA, **shared), EACH.sum(0))
""",
    "one problem for all devices": """
shared = dict(specs=(P("i"), P()), out=P())
for options in ({}, dict(inner_solver=bx.LBFGS(rtol=1e-9))):
    close(sharded(lambda t, th: estimate(together, t[0], th, **options).grad, TARGETS, THETA,
                  **shared), SHARED)
close(sharded(lambda t, th: through_argmin(bx.Minimum(together, t[0]), th, DESCENT), TARGETS,
              THETA, **shared), SHARED)
refused(lambda t, th: through_argmin(bx.Minimum(together, t[0]), th), TARGETS, THETA, **shared)
refused(lambda t, th: through_argmin(bx.Minimum(together, t[0]), th[0])[None], TARGETS, THETAS)
summed = lambda x, th: jax.lax.psum(outer(x, th), "i")
refused(lambda t, th: estimate(inner, t[0], th, summed).grad, TARGETS, THETA, **shared)
own = lambda x, th: inner(x, th, TARGETS[jax.lax.axis_index("i")])
refused(lambda t, th: through_argmin(own, th[0])[None], TARGETS, THETAS, saying="axis_index")
""",
    "a mesh of two axes": """
square = jax.make_mesh((2, 2), ("i", "j"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
both = P(("i", "j"))
close(sharded(lambda t, th: through_argmin(bx.Minimum(inner, t[0]), th[0])[None], TARGETS, THETAS,
              specs=(both, both), out=both, mesh=square), EACH)
partly = dict(mesh=square, axis_names={"i"})
per_row = lambda throw: lambda t, th: through_argmin(
    bx.Minimum(inner, t[0]), th[0], throw=throw)[None]
close(sharded(per_row(False), TARGETS[:2], THETAS[:2], **partly), EACH[:2])
refused(per_row(True), TARGETS[:2], THETAS[:2], saying="throw=False", **partly)
""",
}


RUN_ALL = """
import json, sys, traceback
failures = {}
for name, check in json.loads(sys.argv[1]).items():
    try:
        exec(check)
    except Exception:
        failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


@pytest.fixture(scope="module")
def failures():
    """What failed, by name: all checks in one process, as its start takes seconds."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    source = str(Path(__file__).parent.parent / "src")
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    checks = {name: check.replace("DESCENT", DESCENT) for name, check in CHECKS.items()}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM + RUN_ALL, json.dumps(checks)],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.skipif(not hasattr(jax.lax, "pcast"), reason="an older JAX: check_vma=False")
@pytest.mark.parametrize("name", CHECKS)
def test_in_shard_map(name, failures):
    assert failures.get(name, "") == ""
