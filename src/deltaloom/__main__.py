"""`python -m deltaloom`."""

from deltaloom.cli.main import main

main()
