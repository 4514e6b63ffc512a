"""The `opd` command and what turns a file of settings into a run. Imports everything; nothing imports it."""
