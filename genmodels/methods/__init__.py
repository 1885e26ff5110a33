"""Methods: one file for each paper. METHODS maps method.name to its class."""

from genmodels.methods.edm import EDM
from genmodels.methods.gedi import GEDI

METHODS = {"edm": EDM, "gedi": GEDI}
