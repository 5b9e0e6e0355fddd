"""The derivative of a few more steps at the inner solution."""
