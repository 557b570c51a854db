"""``python -m stgen`` is ``stgen``."""

import sys

from stgen._cli import main

if __name__ == "__main__":
    sys.exit(main())
