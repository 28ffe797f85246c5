"""Artifacts -> one self-contained HTML page (`write_report`), and its tables for a terminal (`console_table`)."""

from seuf_ray.report.page import console_table, write_report

__all__ = ["console_table", "write_report"]
