"""The training application, run from the repository: `python -m train.finetune --help`."""
