"""Artifacts -> self-contained HTML pages (`write_report`, `write_attribution_page`), and tables for a terminal."""

from seuf_ray.report.page import console_table, write_attribution_page, write_report
from seuf_ray.report.search import write_search_page

__all__ = ["console_table", "write_attribution_page", "write_report", "write_search_page"]
