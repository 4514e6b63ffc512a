"""Lightning OPD: the method, and its stages on stored scores."""

from opd.trainers.lightning_opd.method import LightningOpd
