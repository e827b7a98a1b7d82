"""What `check` and `train` refuse before a step is made."""
