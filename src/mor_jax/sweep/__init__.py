"""Lists of runs, their tables, and the tools of compute-optimal scaling (paper section 3 and table 9)."""
