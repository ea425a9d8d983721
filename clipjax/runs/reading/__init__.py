"""Reading: turns the lines of a file into the columns of a `Run`."""
