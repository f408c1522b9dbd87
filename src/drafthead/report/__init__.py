"""Reports of the measurements: the page, the model card, the hub."""
