"""The agent of torchrun, silent about how it or a rank ended: `python -m prerank_tools.engines.agent`."""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # what a rank has to say it says itself
    try:
        main()
    except SignalException as told:
        sys.exit(128 + told.sigval)
    except ChildFailedError:
        sys.exit(1)
