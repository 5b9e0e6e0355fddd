"""What is said where a function has too few derivatives."""

from ._forward import MOST_VARIABLES

# What JAX raises, and what others do who refuse one of the modes.
REFUSALS = (TypeError, ValueError, NotImplementedError, RuntimeError)


class NoDerivativeError(TypeError):
    """A function cannot be differentiated as often as it takes."""


_MESSAGE = (
    "One of your functions cannot be differentiated as often as it takes here: neither by forward "
    "over reverse mode, nor by reverse over reverse, nor by forward over forward (the last for at "
    f"most {MOST_VARIABLES} variables). The usual causes are a jax.custom_vjp whose backward pass "
    "has no derivative itself, or not enough of them: of jax.experimental.ode.odeint there are two "
    "(gradients of bx.hypergradient and bx.argmin), and no third (Hessians of these). State the "
    "derivative by jax.custom_jvp in place of jax.custom_vjp, with formulas that can be "
    "differentiated again, and write loops as a jax.lax.scan of a fixed length."
)


def no_derivative(cause: Exception | None = None) -> TypeError:
    """The error that says so; `cause` itself if it does."""
    return cause if isinstance(cause, NoDerivativeError) else NoDerivativeError(_MESSAGE)
