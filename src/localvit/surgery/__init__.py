"""Locality in a transformer that somebody else wrote: where it goes, the two ways to put it there, and the call."""

from localvit.surgery import hosts  # importing it registers the rules of the known hosts
