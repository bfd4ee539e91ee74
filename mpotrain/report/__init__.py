"""What `mpotrain plan` prints: a run weighed before any process starts."""
