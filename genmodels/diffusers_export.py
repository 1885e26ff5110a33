"""python -m genmodels.diffusers_export: see genmodels.checkpoint.diffusers."""

import sys

from genmodels import cli
from genmodels.checkpoint.diffusers import export_diffusers, main

__all__ = ["export_diffusers", "main"]

if __name__ == "__main__":
    sys.exit(cli.run(main))
