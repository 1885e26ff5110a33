"""Methods: one file for each paper. METHODS maps method.name to its class."""

from genmodels.methods.ddo import DDO
from genmodels.methods.edm import EDM
from genmodels.methods.gbm import GBM

METHODS = {"edm": EDM, "ddo": DDO, "gbm": GBM}
