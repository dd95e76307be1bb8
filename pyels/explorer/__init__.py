"""A trace as a web page: which training patches every pixel of a sample is made of, step by step."""

from pyels.explorer.page import Page, page_of, write_page

__all__ = ["Page", "page_of", "write_page"]
