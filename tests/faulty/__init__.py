"""Plug-ins that break on purpose; a dotted name in a job file finds them."""
