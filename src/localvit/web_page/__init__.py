"""A web page that classifies images with an exported model in the browser, without a server and without requests."""

from localvit.web_page.page import write_page

__all__ = ["write_page"]
