"""From files to batches of tokens.

formats   files of records, local or remote
sources   parquet, JSONL, CSV, text, hub: one reader
rows      records -> texts and questions -> token rows
batches   padding, units, the sampler, a rank's share
"""
