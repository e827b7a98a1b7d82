"""Functions that all backends share: ranking, index folders and compiled loops."""
