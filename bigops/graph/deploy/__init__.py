"""A whole model as one graph for inference: `deploy`, its passes, and the backend of compile."""

from bigops.graph.deploy.deployed import Deployed
from bigops.graph.deploy.export import deploy

__all__ = ["Deployed", "deploy"]
