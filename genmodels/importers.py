"""python -m genmodels.importers: see genmodels.checkpoint.edm_pickles."""

import sys

from genmodels import cli
from genmodels.checkpoint.edm_pickles import convert, main, read_released, released_names

__all__ = ["convert", "main", "read_released", "released_names"]

if __name__ == "__main__":
    sys.exit(cli.run(main))
