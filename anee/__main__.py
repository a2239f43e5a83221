"""The command line as ``python -m anee``."""

from anee.cli import main

main()
