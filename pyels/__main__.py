"""`python -m pyels` is the command line program."""

from pyels.cli import main

main()
