"""Words used everywhere: whole files, devices, processes, tables, weights read without running code."""
