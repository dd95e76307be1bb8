"""Banks: the training images that machines draw on, in memory or in a file, and which of them count."""

from pyels.bank.bank import PatchBank
from pyels.bank.selection import Selection

__all__ = ["PatchBank", "Selection"]
