"""The verdict on a run: one file for each family of findings."""
