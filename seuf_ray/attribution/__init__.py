"""Which experts carry a set of texts, and which of them become targets.

units        sources -> packed units, each counted once
bootstrap    how often each replicate draws a sequence
statistics   exact (sum, count) of routing
results      units -> result records, on one process or on ranks in step
streaming    the same for a model larger than memory, layer by layer
report       statistics -> AttributionReport
selection    report + rule -> UnlearningPlan
esft         ESFT's rule and its expert configurations
topics       two reports side by side
table        a report as parquet
"""
