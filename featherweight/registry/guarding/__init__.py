"""Holding MLflow to the histories: what its webhooks tell, and looks at everything for what they do not."""
