"""The command line, where the first of several processes is the last to get there."""

import os
import time

from mm_piece.cli import main

if __name__ == "__main__":
    time.sleep(5 if os.environ["RANK"] == "0" else 0)
    main()
