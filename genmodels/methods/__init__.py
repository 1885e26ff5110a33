"""Methods: one file for each paper. METHODS maps method.name to its class."""

from genmodels.methods.cdrl import CDRL
from genmodels.methods.edm import EDM

METHODS = {"edm": EDM, "cdrl": CDRL}
