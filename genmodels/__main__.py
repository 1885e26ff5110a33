"""python -m genmodels: see genmodels.commands.main."""

import sys

from genmodels.commands.main import main

if __name__ == "__main__":
    sys.exit(main(name="python -m genmodels"))
