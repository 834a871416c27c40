"""The settings of a run, as a file of them and as options of the commands."""
