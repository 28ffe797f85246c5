"""Search for the best setting: trials over the space of [search] on one resident base model; writes search.json,
search.parquet, search.csv, the best trial's patch/ and report.html.

python jobs/search.py jobs/search_demo.toml
python jobs/search.py jobs/search_demo.toml resume=true
"""

from seuf_ray.command import command

config = command(__doc__)

from seuf_ray.artifacts import AttributionReport
from seuf_ray.console import heading, show_attribution, show_evaluation, show_search, trial_printer
from seuf_ray.outputs import ATTRIBUTED, ATTRIBUTION, claim
from seuf_ray.report import write_search_page
from seuf_ray.search.objectives import words
from seuf_ray.search.outcome import SEARCHED, finish_search, prepare_search
from seuf_ray.stages.attribute import attribute
from seuf_ray.stages.evaluate import evaluate
from seuf_ray.stages.search import search
from seuf_ray.stages.session import session

job = prepare_search(config)  # reads and checks everything; nothing is written before this returns
claim(config, *ATTRIBUTED, *SEARCHED)

with session(config.cluster):
    if config.inputs.attribution is None:
        heading("attribute: which experts does the forget set use?")
        report = attribute(job)
    else:
        report = job.read(AttributionReport, ATTRIBUTION, config.inputs.attribution)
    show_attribution(report)

    heading(f"search: {config.search.searcher}, for {words(config.search)}")
    trials = search(job, report, trial_printer(config.search))
    found = finish_search(job, report, trials)
    show_search(found)

    before = after = None
    if found.best is not None:
        heading(f"evaluate: the original, then the patch of trial {found.best}")
        before = evaluate(job)
        show_evaluation(before)
        after = evaluate(job, job.path("patch"))
        show_evaluation(after)
heading(f"done: {write_search_page(job.path('report.html'), found, before, after)}")
