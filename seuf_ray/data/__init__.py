"""From files to batches of tokens.

formats   files of records, local or remote
folders   a path, a folder or a pattern -> its files
sources   parquet, JSONL, CSV, text, hub: one reader
rows      records -> texts and questions -> token rows
batches   padding, units, the sampler, a rank's share
"""
