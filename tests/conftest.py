"""Strict settings for every test: x64, no silent promotion, no window, fixed seeds."""

import gc
import math
import os
from pathlib import Path

from processes import quick_to_compile

os.environ["XLA_FLAGS"] = quick_to_compile()
# Before NumPy is imported. Several processes run the suite: one BLAS thread each, as two
# that wait for each other stall for a whole time slice. (A single-threaded XLA and a
# compilation cache for the session gained nothing when measured.)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where each operation was written, for profilers: a thirtieth of the time of the suite.
jax.config.update("jax_traceback_in_locations_limit", 0)

# A trace makes objects by the ten thousands and few cycles: with Python's own threshold of 700
# a tenth of the time is spent on looking for them.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# Compilation takes seconds, so no deadline. The same examples each time; other ones, and
# more of them, with HYPOTHESIS_PROFILE=nightly, which prints how to reproduce a failure.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# One oracle a rule, every inner and linear solver once, the conditions, the layers: for the
# inner loop of a developer, and for versions of JAX and Python beside the one at hand.
QUICK = (
    "test_contract.py::test_every_rule_reaches_its_order[logistic-",
    "test_contract.py::test_every_inner_solver_serves_implicit",
    "test_contract.py::test_every_linear_solver_serves_implicit",
    "test_contract.py::test_solvers_of_other_kinds_serve_every_condition",
    "test_contract.py::test_argmin_jvp_is_the_transpose_of_vjp[quadratic]",
    "test_proximal.py::test_the_projection_on_the_simplex",
    "test_constrained.py::test_inequalities_on_an_edge_and_at_a_vertex",
    "test_layering.py",
    "test_oracles.py",
    "test_solve.py::test_history_agrees_with_hypergradient",
)
# Whole programs in processes of their own: `make scripts`.
SCRIPTS = (
    "test_benchmarks.py",
    "test_examples.py",
    "test_demo.py::test_quick",
    "test_demo.py::test_cleaning_finds",
)


def pytest_collection_modifyitems(items):
    for item in items:
        name = f"{item.path.name}::{item.name}"
        if name.startswith(QUICK):
            item.add_marker(pytest.mark.quick)
        if name.startswith(SCRIPTS):
            item.add_marker(pytest.mark.script)


@pytest.fixture(autouse=True, scope="module")
def free_compiled_programs():
    """Every compiled program maps memory, and a process may have 65,530 mappings on Linux.

    Beyond that the compiler ends the process. Not after every module: JAX' small programs for
    single operations serve the next, too.
    """
    yield
    if num_mappings() > 30_000:
        jax.clear_caches()


def num_mappings():
    try:
        return Path("/proc/self/maps").read_text().count("\n")
    except OSError:  # not Linux: no such limit, but memory
        return math.inf


@pytest.fixture
def user_settings():
    """JAX as users have it, for the code in the documentation: 32 bit, no strictness."""
    options = {
        "jax_enable_x64": False,
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
