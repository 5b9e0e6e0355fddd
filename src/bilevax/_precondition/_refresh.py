"""When a preconditioner that is kept from one outer step to the next is made anew."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Refresh(eqx.Module):
    """Rent or buy: renewed when the steps lost to its age have cost as much as a new one.

    A step is lost if the solve right after the renewal, or the best one since, did without
    it. Whatever the sequence, at most about twice the products of the best choice made in
    hindsight are spent. A preconditioner that could not be made counts all steps as lost.
    """

    is_due: Bool[Array, ""]
    fewest: Int[Array, ""]  # steps of a solve since the renewal
    lost: Int[Array, ""]

    def renewed(self) -> "Refresh":
        """Right after the renewal."""
        return Refresh(jnp.zeros_like(self.is_due), *_unknown())

    def learn(self, num_steps: Array, cost: int, is_usable: Array) -> "Refresh":
        """After a solve of `num_steps`; a renewal takes `cost` products."""
        num_steps = num_steps.astype(jnp.int32)
        fewest = jnp.minimum(self.fewest, num_steps)
        lost = self.lost + jnp.where(is_usable, num_steps - fewest, num_steps)
        return Refresh(self.is_due | (lost >= cost), fewest, lost)


def never_made() -> Refresh:
    """Before the first solve."""
    return Refresh(jnp.ones((), bool), *_unknown())


def _unknown() -> tuple[Array, Array]:
    return jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32), jnp.zeros((), jnp.int32)
