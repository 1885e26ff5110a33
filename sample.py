"""Generate images with a trained model, or restore noisy ones: python sample.py --help."""

import sys

from genmodels.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
