"""The page over all runs and registered models: what it shows, who may ask for it, and how it decides by the same functions."""
