"""The page of `vavae studio`: a file per tab, its pure functions first, and `page` that joins them.

Before Gradio is imported, here is switched off what it would ask of other hosts.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
