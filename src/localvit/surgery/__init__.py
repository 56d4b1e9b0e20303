"""Locality in a transformer from another library: `localize`, and its two methods, `Adapter` and `Replace`."""

from localvit.surgery import hosts  # Importing it registers the rules of the supported hosts.
