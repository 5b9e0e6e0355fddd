"""How the tests compile, and how processes that run as a user's do not."""

import importlib.metadata
import os

# Most of the suite's time is XLA compiling programs that run for milliseconds. Without LLVM's
# optimisations, and with the older emitters of fused loops, that takes half of it. In one part:
# of several, jaxlib 0.10.2 without optimisations compiles some programs wrong (the derivative of
# a step of `optax.contrib.cocob` shows it), with one it does not.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def quick_to_compile() -> str:
    """XLA's flags for this process and those it starts. What was given wins, as the last.

    XLA ends the process at a flag that it does not know, as of jaxlib 0.12 that of the emitters.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    version = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    unknown = "fusion_emitters" if version >= (0, 12) else " "
    ours = [flag for flag in QUICK_TO_COMPILE if unknown not in flag and flag not in given]
    return " ".join([*ours, *given])


def as_users_have_it() -> dict[str, str]:
    """The environment of a process that compiles as it does for users."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = " ".join(flag for flag in flags if flag not in QUICK_TO_COMPILE)
    return {**os.environ, "XLA_FLAGS": kept}
