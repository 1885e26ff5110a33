"""`python -m benchmarks.digits_net`: the command that the header of the digits weights names."""

import sys

from benchmarks.feature_nets import main

if __name__ == "__main__":
    sys.exit(main(["digits", *sys.argv[1:]]))
