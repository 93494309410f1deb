"""The registry: registered versions, their history and lineage, and the folder that MLflow serves."""
