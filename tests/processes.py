"""How the tests compile, and how processes that run as a user's do not."""

import importlib.metadata
import os

# Most of the suite's time is XLA compiling programs that run for milliseconds. With the older
# emitters of fused loops that takes half as long. (Not together with a lower level of LLVM's
# optimisations: that is quicker still, and jaxlib 0.10.2 then compiles wrong programs.)
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"


def quick_to_compile() -> str:
    """XLA's flags for this process and those it starts. What was given wins, as the last.

    XLA ends the process at a flag that it does not know, as of jaxlib 0.12 this one.
    """
    given = os.environ.get("XLA_FLAGS", "")
    version = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    if not (0, 6) <= version < (0, 12):
        return given
    return given if QUICK_TO_COMPILE in given else f"{QUICK_TO_COMPILE} {given}".strip()


def as_users_have_it() -> dict[str, str]:
    """The environment of a process that compiles as it does for users."""
    flags = os.environ.get("XLA_FLAGS", "").replace(QUICK_TO_COMPILE, "").strip()
    return {**os.environ, "XLA_FLAGS": flags}
