"""python -m genmodels.importers: see genmodels.checkpoint.released."""

import sys

from genmodels import cli
from genmodels.checkpoint.edm_pickles import read_released, released_names
from genmodels.checkpoint.released import convert, main

__all__ = ["convert", "main", "read_released", "released_names"]

if __name__ == "__main__":
    sys.exit(cli.run(main))
