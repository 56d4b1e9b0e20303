"""The command line. It stands beside the package so that `localvit --help` need not import torch."""

VERSION = "0.1.0"
