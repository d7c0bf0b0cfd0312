"""The version, for all modules: they must not import the package itself, which imports some of them."""

__version__ = "0.1.0"
