"""The stages as Ray jobs; the only importers of ray. For each verb here a noun outside does the work without Ray."""
