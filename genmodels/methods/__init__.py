"""Methods: one file for each paper. METHODS maps method.name to its class."""

from genmodels.methods.cdrl import CDRL
from genmodels.methods.edm import EDM
from genmodels.methods.gedi import GEDI

METHODS = {"edm": EDM, "cdrl": CDRL, "gedi": GEDI}
