"""The derivative of the steps that were taken."""
