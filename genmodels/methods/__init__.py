"""Methods: one file for each paper. METHODS maps method.name to its class."""

from genmodels.methods.cdrl import CDRL
from genmodels.methods.ddo import DDO
from genmodels.methods.edm import EDM
from genmodels.methods.energy_matching import EnergyMatching
from genmodels.methods.gbm import GBM
from genmodels.methods.gedi import GEDI
from genmodels.methods.interpolant import Interpolant
from genmodels.methods.meco import MECO
from genmodels.methods.noise2score import Noise2Score

METHODS = {
    "edm": EDM,
    "ddo": DDO,
    "cdrl": CDRL,
    "gbm": GBM,
    "noise2score": Noise2Score,
    "gedi": GEDI,
    "energy_matching": EnergyMatching,
    "interpolant": Interpolant,
    "meco": MECO,
}
