"""python -m genmodels.checkpoint: see genmodels.checkpoint.export."""

import sys

from genmodels import cli
from genmodels.checkpoint.export import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
