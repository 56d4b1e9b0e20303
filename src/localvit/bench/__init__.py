"""Models measured side by side, in interleaved rounds of one process, so that their speeds can be compared."""
