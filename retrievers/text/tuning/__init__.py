"""Fine-tunes the encoder of `dense` on the training data of a task.

`settings.py` has the parameters, `pairs.py` draws the pairs of a query and a relevant document, `negatives.py` finds
their negatives, `loss.py` has the loss, `job.py` writes all of it into a folder and starts a process, and `train.py` is
what this process runs: sentence-transformers' trainer. It reads the folder by `job_folder.py`, and chooses the epoch by
`measure.py`.
"""
