"""The families of checkpoints, one declaration a file; every module here with a ``FAMILY`` is found."""
