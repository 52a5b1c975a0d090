"""What of the paper can be checked on a small machine, a module a page.

The prose of a page is in docs/en/reproduction, with places for what is
measured. A module has the measurement, what it makes of that for these
places, and the figure: its ``PAGE``.
"""
