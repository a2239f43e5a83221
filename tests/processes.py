"""Commands in processes of their own. They are forked, so that nothing is imported anew and a kill meets their work."""

import multiprocessing
import os
import sys
from pathlib import Path

from anee.cli import main
from anee_core.steps.native.build import library


def started(work, log, **environment):
    """Start a process that does some work and return it; what it prints goes into a file."""

    def inside():
        with Path(log).open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(environment)
        work()

    process = multiprocessing.get_context("fork").Process(target=inside)
    process.start()
    return process


def command(*words):
    """Return the work of an ``anee`` command."""

    def work():
        sys.argv = ["anee", *map(str, words)]
        try:
            main()
        except KeyboardInterrupt:  # before or after the command
            os._exit(130)

    return work


def compiled():
    """Load the compiled library as a process does that has none yet."""
    library.cache_clear()
    library()
