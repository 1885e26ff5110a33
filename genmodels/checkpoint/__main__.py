"""python -m genmodels.checkpoint: see genmodels.checkpoint.exports."""

import sys

from genmodels import cli
from genmodels.checkpoint.exports import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
