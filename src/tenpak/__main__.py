"""``python -m tenpak``."""

from tenpak.cli import main

main()
