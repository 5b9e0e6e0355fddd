"""Loops that can be differentiated in little memory. Nothing here knows a problem."""
