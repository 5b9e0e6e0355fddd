"""The derivative of a smoothed problem, from values."""
