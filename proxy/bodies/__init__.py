"""Bodies that change on their way: sealed, opened, read in ranges, held; and the room they take."""
