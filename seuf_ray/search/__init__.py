"""Many trials over one resident base.

spaces       what a search tries, and when a path is there
parsing      the table of a job file -> spaces
checking     whether a job can be searched: every value, and every pair, makes a job
suggestions  assignments: listed, or by optuna
schedule     the order of trials, and the record of each
halving      ASHA that is repeatable: who ends early
objectives   what a search is after: scores, the best, the front
importance   what each searched path explains of the score
resident     the base that stays in memory while trials come and go
outcome      what is checked before a search, and what it leaves
"""
