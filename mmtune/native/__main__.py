"""Build the native node ahead, and say where it lies."""
import sys

from mmtune.native import BuildError, load

try:
    # Loaded, too: what does not load is no use.
    print(load().__file__)
except BuildError as error:
    sys.exit(str(error))
