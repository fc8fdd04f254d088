"""``python -m nemo_minitron <stage> key=value ...``."""

import sys

from nemo_minitron.cli import main

if __name__ == "__main__":
    sys.exit(main())
