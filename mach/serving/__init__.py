"""A server of trained runs over HTTP, its page, and its clients; needs ``pip install 'mach-classifier[serve]'``."""
