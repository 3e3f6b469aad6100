"""Evaluation of checkpoints: `python -m trainer.eval`; manual and design in docs/evaluation.md.

`config` what can be told; `settings`, `tasks`, `checkpoints` the three axes of the grid; `plan` what
is asked for with which seed; `store` the resumable files; `generate` the requests; `metrics`,
`summary` the numbers; `choice`, `likelihood` multiple choice and KL; `tables`, `paper`, `plots`,
`page` what is written for people; `offline` data sets out of a package.
"""
