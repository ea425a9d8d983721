assert norm == 13
