"""``python -m lmim_bench`` is the same as the ``lmim-bench`` command."""

from .bench.cli import main

if __name__ == "__main__":
    main()
