"""Score every expert on the forget set: writes attribution.json.

python jobs/attribute.py jobs/demo.toml
"""

from seuf_ray.command import command

config = command(__doc__)

from seuf_ray.console import heading, show_attribution
from seuf_ray.job import ATTRIBUTION, claim, prepare
from seuf_ray.stages.attribute import attribute
from seuf_ray.stages.session import session

job = prepare(config)
claim(config, ATTRIBUTION)
with session(config.cluster):
    heading("attribute: which experts does the forget set use?")
    show_attribution(attribute(job))
heading(f"done: {job.path(ATTRIBUTION)}")
