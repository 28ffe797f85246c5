"""Score every expert on the forget and the retain set: writes attribution.json, .parquet, .html and esft.json.

python jobs/attribute.py jobs/demo.toml
python jobs/attribute.py jobs/demo.toml attribution.engine=streamed attribution.score=contrast output_dir=runs/contrast
python jobs/attribute.py --compare runs/demo/attribution.json runs/geography/attribution.json
"""

from seuf_ray.command import command, pair_after

if (pair := pair_after("--compare")) is not None:
    from seuf_ray.attribution.topics import compare_reports
    from seuf_ray.console import show_topics

    show_topics(compare_reports(*pair))
    raise SystemExit

config = command(__doc__)

from seuf_ray.console import heading, show_attribution
from seuf_ray.job import prepare_attribution
from seuf_ray.outputs import ATTRIBUTED, ATTRIBUTION, claim
from seuf_ray.stages.attribute import attribute
from seuf_ray.stages.session import session

job = prepare_attribution(config)
claim(config, *ATTRIBUTED)
with session(config.cluster):
    heading("attribute: which experts does the forget set use?")
    show_attribution(attribute(job))
heading(f"done: {job.path(ATTRIBUTION)}")
