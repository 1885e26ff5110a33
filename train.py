"""Train a model from a config: python train.py --help."""

import sys

from genmodels.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
