"""Recording: turns pushes into the rows of a file."""
