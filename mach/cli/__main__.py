"""``python -m mach.cli``."""

from mach.cli import main

main()
