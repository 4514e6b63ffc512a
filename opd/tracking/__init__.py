"""Recording a run's numbers: JSON lines in the run folder, wandb, the terminal, and a picture.

The loop gives rows and episodes; nothing here decides what is measured. `read_rows` reads back what was
written. Sampling, training and random states are never touched from here.
"""

from opd.tracking.files import read_rows
from opd.tracking.tracker import NoTracker, Tracker, last_row, put_rows_aside
