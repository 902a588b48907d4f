"""The version of the engine, read by hatchling and written into every part."""

__version__ = "0.1.0"
