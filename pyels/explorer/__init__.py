"""A trace as a web page: which training patches every pixel of a sample is made of, step by step."""

from pyels.explorer.page import write_page

__all__ = ["write_page"]
