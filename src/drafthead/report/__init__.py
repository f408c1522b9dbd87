"""What was measured, for people: the page, the model card, the hub."""
