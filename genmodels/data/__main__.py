"""python -m genmodels.data: see genmodels.data.commands."""

import sys

from genmodels import cli
from genmodels.data.commands import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
