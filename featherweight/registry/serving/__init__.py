"""Serving of registered versions over HTTP: verified copies, a server process for each, and the front before them."""
