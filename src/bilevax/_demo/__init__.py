"""Demonstrations on real data: what `python -m bilevax demo` runs.

Each writes a picture and a JSON file of all numbers into a directory, and prints what it
found. They need the optional dependencies of `bilevax[demo]`.
"""

from ._run_cleaning import run_cleaning as run_cleaning
from ._run_tuning import run_tuning as run_tuning
