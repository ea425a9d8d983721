"""Recording: from pushes to the rows of a file."""
