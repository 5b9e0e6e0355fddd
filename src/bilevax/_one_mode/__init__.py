"""Functions that JAX can differentiate in one mode only, made fit for both."""

from ._function import OneMode as OneMode
from ._mode import mode_of as mode_of
