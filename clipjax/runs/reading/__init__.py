"""Reading: from the lines of a file, or arrays, to the columns of a `Run`."""
