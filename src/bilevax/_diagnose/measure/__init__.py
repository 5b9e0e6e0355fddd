"""What is measured of a problem, compiled."""
