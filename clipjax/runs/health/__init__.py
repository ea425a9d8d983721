"""The verdict on a run, with one file per family of findings."""
