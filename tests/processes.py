"""How the tests compile, and how processes that run as a user's do not."""

import os

# Most of the suite's time is XLA compiling programs that run for milliseconds. With the older
# emitters of fused loops that takes half as long. (Not together with a lower level of LLVM's
# optimisations: that is quicker still, and jaxlib 0.10.2 then compiles wrong programs.)
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"


def quick_to_compile() -> str:
    """XLA's flags for this process and those it starts. What was given wins, as the last."""
    given = os.environ.get("XLA_FLAGS", "")
    return given if QUICK_TO_COMPILE in given else f"{QUICK_TO_COMPILE} {given}".strip()


def as_users_have_it() -> dict[str, str]:
    """The environment of a process that compiles as it does for users."""
    flags = os.environ.get("XLA_FLAGS", "").replace(QUICK_TO_COMPILE, "").strip()
    return {**os.environ, "XLA_FLAGS": flags}
