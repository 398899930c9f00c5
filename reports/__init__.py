"""Reports read run folders only: a page (``html``), a table for the terminal (``text``); without torch."""
