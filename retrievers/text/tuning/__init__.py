"""Fine-tunes the encoder of `dense` on the training data of a task.

`settings.py` has the parameters, `pairs.py` draws the pairs of a query and a relevant document, `negatives.py` finds
their negatives, `written.py` reads those that a language model wrote, and `source_probe.py` says whether these can be
told from documents. `loss.py` has the loss, `job.py` writes all of it into a folder and starts a process, and
`train.py` is what this process runs: sentence-transformers' trainer. It reads the folder by `job_folder.py`, and
chooses the epoch by `measure.py`. `random_weights.py` makes an encoder that was not pre-trained.
"""
