"""The checks that `check` and `train` make before training begins."""
