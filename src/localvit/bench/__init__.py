"""Models measured side by side, in interleaved rounds of one process."""
