"""The command line, where the first of several processes is slow to write a store's results."""

import os
import time

from mm_piece.cli import main
from mm_piece.store.delta_store import DeltaStore

if __name__ == "__main__":
    write = DeltaStore.update_results

    def write_late(store, change):
        time.sleep(2 if os.environ["RANK"] == "0" else 0)
        write(store, change)

    DeltaStore.update_results = write_late
    main()
