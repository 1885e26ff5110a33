"""Score a model, or a set of images, against real images: python evaluate.py --help."""

import sys

from genmodels.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
