"""Fine-tunes the encoder of `dense` and the cross-encoder of `rerank` on the training data of a task.

`settings.py` has the parameters, `pairs.py` draws the pairs of a query and a relevant document, `negatives.py` finds
the negatives of encoders, `loss.py` has their loss, `job.py` writes all of it into a folder and starts a process, and
`train.py` is what this process runs: sentence-transformers' trainer. It reads the folder by `job_folder.py`, and
chooses the epoch by `measure.py`. `trainer.py` has what all fits share, and `encoder_fit.py` what only those of
encoders have. What only those of cross-encoders have is in `cross_job.py` and `cross_fit.py`.
"""
