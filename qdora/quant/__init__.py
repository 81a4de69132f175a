"""Frozen weights, dense or 4-bit, that are read by row tiles."""

import logging

# On some CPUs bitsandbytes warns, at import, about a kernel for its own layers, which are not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
