"""For tools that expect this file, and nothing else: all that it could say is in pyproject.toml."""

from setuptools import setup


setup()
