"""`python -m instantft` is the command line."""

from .cli import main

main()
