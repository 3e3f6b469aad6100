"""Evaluation of checkpoints: `python -m trainer.eval`; manual and design in docs/evaluation.md.

`config` what can be told; `settings`, `tasks`, `checkpoints` the three axes of the grid; `plan`
what is asked for, with which seed; `store` the resumable files; `sampling`, `generate` the
requests; `metrics`, `summary` the numbers; `choice`, `likelihood`, `likely` multiple choice and KL;
`table`, `tables`, `compare`, `paper`, `plots`, `page` what is written for people; `offline` data
out of a package.
"""
