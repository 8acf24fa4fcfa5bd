"""``compression="auto"``: predicts what a step would take with each candidate, and changes to the best one.

Read :mod:`…settings`, then :mod:`…controller`, which decides, and :mod:`…adaptation`, which has ranks agree.
"""

from danon_lightning.strategies.communication.adaptive.settings import AutoCompression

__all__ = ["AutoCompression"]
