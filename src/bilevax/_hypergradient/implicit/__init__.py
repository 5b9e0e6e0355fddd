"""The derivative of the inner solution as a point: one adjoint system."""
