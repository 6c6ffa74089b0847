"""What is written on a message, read without I/O: fields, forms, checksums, signatures."""
