"""``python -m anee``."""

from anee.cli import main

main()
