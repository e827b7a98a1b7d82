"""What every backend builds on: ranking, index folders, compiled kernels."""
