"""SD-Zero: the method, and the revisions that it collects."""

from opd.trainers.sd_zero.method import SdZero
