"""The version of this package, also where it is imported from a copy of the source that was never installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("localvit")
except PackageNotFoundError:
    VERSION = "0+not.installed"
